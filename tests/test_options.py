"""Every option of every command: what cannot be used is refused by name, in one line, before weights are read."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import vllm_sparse
from vllm_sparse.errors import ConfigError
from vllm_sparse.tools import cli
from vllm_sparse.tools.commands import Parser, json_object, real, several, whole

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip
LONG = "9" * 5000


@pytest.fixture
def model(tmp_path):
    return configured(tmp_path / "model")


def configured(path, **changes):
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return path


def refusal(capsys, *arguments) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    said = capsys.readouterr().err
    line = said.splitlines()[-1]
    assert line.startswith("vllm-sparse: ") and said.count("vllm-sparse: ") == 1 and len(line) < 1500, said
    return line


def plan(capsys, *arguments) -> str:
    assert cli.main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


GIB = ("nan", "inf", "-inf", "-1", "1e30", "1e400", "x", "", LONG)
# Values that each option of `plan` refuses.
PLAN = {
    "--gpu": (*GIB, "0"),
    "--host": GIB,
    "--kv-gib": (*GIB, "0", "81"),
    "--gpu-memory-utilization": ("nan", "inf", "0", "-0.5", "1.5", "90", "x", "", LONG),
    "--context": ("0", "-1", "1.5", "nan", "8193", "128k", "9999m", "2147483648", "١", "", LONG, "k"),
    "--tensor-parallel-size": ("0", "-1", "3", "1.5", "nan", "10000000000", "", LONG),
    "--max-num-seqs": ("0", "-1", "1.5", "nan", "10000000000", "", LONG),
    "--max-num-batched-tokens": ("0", "-1", "1.5", "nan", "10000000000", "", LONG),
    "--block-size": ("0", "-16", "24", "1.5", "nan", "10000000000", "", LONG),
    "--sparse": (
        "", "{", "[]", "null", "3", '{"a": ' * 9000, f'{{"budget_tokens": {LONG}}}', '{"budget_tokens": 1e400}',
        '{"budget_tokens": 512, "budget_tokens": 256}', '{"sparse": {}}', '{"offload": []}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("option", PLAN)
def test_plan_refuses_wrong_values(option, model, capsys):
    for value in PLAN[option]:
        given = {"--gpu": "80", "--host": "64", option: value}
        said = refusal(capsys, "plan", model, *(f"{name}={text}" for name, text in given.items()))
        assert option in said or (option == "--sparse" and "sparse." in said), (value, said)
        assert any(words in said.casefold() for words in ("allowed", "expected", "divide", "stand in")), (
            value,
            said,
        )


def test_plan_takes_ends_of_ranges(model, capsys):
    """Plan takes the ends of what is allowed."""
    for option, value in (
        ("--host", "0"), ("--gpu-memory-utilization", "1"), ("--context", "8192"), ("--context", "8k"),
        ("--max-num-seqs", "1"), ("--kv-gib", "80"), ("--tensor-parallel-size", "4"), ("--gpu", "1048576"),
        ("--max-num-batched-tokens", "1"), ("--block-size", "256"), ("--sparse", " {} "),
    ):  # fmt: skip
        given = {"--gpu": "80", "--host": "64", option: value}
        assert "tokens" in plan(capsys, model, *(f"{name}={text}" for name, text in given.items()))


def test_plan_counts_contexts(tmp_path, capsys):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e4}
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    for number, (changes, context) in enumerate(
        (
            ({}, 8192), ({"max_position_embeddings": 1 << 20}, 131072), ({"rope_scaling": linear}, 16384),
            ({"rope_scaling": yarn, "max_position_embeddings": 32768}, 32768),  # scaled already
        )
    ):  # fmt: skip
        path = configured(tmp_path / f"model-{number}", **changes)
        assert f"contexts of {context:,}\n" in plan(capsys, path, "--gpu=80", "--host=64")
        if context != 131072:
            said = refusal(capsys, "plan", path, "--gpu=80", "--host=64", f"--context={context + 1}")
            assert f"--context: {context + 1}; allowed for this model: 1 to {context}" in said


BROKEN = {
    "nothing": None, "empty": b"", "no json": b"{", "deep": b'{"a":' * 100_000, "list": b"[]",
    "unknown": b'{"x": 1}',
    "no kind": b'{"model_type": "no-such-model"}', "no sizes": b'{"model_type": "llama", "hidden_size": "wide"}',
    "binary": bytes(range(256)), "zero heads": json.dumps({**LLAMA, "num_attention_heads": 0}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_plan_names_an_unreadable_model(case, tmp_path, capsys):
    """Plan names a model that cannot be read."""
    if BROKEN[case] is not None:
        (tmp_path / "config.json").write_bytes(BROKEN[case])
    said = refusal(capsys, "plan", tmp_path, "--gpu=80", "--host=64")
    assert "MODEL" in said and str(tmp_path) in said


@pytest.mark.parametrize(
    "name", ["", " ", "/nowhere", "x" * 5000, "a\x00b", "no/such/model", "~nobodyxyz/x", "\ud800"]
)
def test_plan_names_a_missing_model(name, capsys):
    """Plan names a model that is not there."""
    assert "MODEL" in refusal(capsys, "plan", name, "--gpu=80", "--host=64")


@pytest.mark.parametrize("command", ["tune", "eval"])
@pytest.mark.engine
def test_missing_models_take_one_line(command, tmp_path, capsys):
    """Models that are not there are refused in one line."""
    pytest.importorskip("vllm")
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 4000)
    out = tmp_path / "out.json"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_bytes(b"{")
    no_tokenizer = configured(tmp_path / "bare")
    options = ["--text", text, "--out", out, *(("--policies", "quest") if command == "eval" else ())]
    for name in ("", "/nowhere", "a\x00b", "no/such/model", tmp_path / "broken", no_tokenizer):
        said = refusal(capsys, command, name, *options)
        assert "MODEL" in said, said
    said = refusal(capsys, command, no_tokenizer, *options, "--dtype", "float7")
    assert "--dtype float7" in said
    said = refusal(capsys, command, no_tokenizer, *options, "--tensor-parallel-size", 3)
    assert "--tensor-parallel-size: 3; allowed: what divides the model's 4 heads" in said
    assert not out.exists()


@pytest.mark.parametrize("command, ending", [("tune", "json"), ("tune --decode", "json"), ("eval", "jsonl")])
@pytest.mark.engine
def test_short_text_is_refused_early(tiny, command, ending, tmp_path, monkeypatch, capsys):
    """A text too short is found before weights are read."""
    from vllm_sparse.tools import commands

    monkeypatch.setattr(commands, "start_engine", lambda *args, **more: pytest.fail("weights were read"))
    text = tmp_path / "text.txt"
    for content in ("", "Too few words. " * 20):
        text.write_text(content)
        options = ["--text", text, "--out", tmp_path / f"out.{ending}"]
        options += ("--policies", "quest") if command == "eval" else ()
        said = refusal(capsys, *command.split(), tiny.model(), *options)
        assert "--text: " in said and "are too few" in said


WHOLE = ("-1", "1.5", "nan", "inf", "x", "", "10000000000", LONG)
# Values that each option of `tune` and `eval` refuses without a model.
OPTIONS = {
    "tune": {
        "--tokens": ("0", *WHOLE), "--passages": ("0", *WHOLE), "--tolerance": ("-1", "nan", "inf", "x", "", LONG),
        "--budget-tokens": ("0", *WHOLE), "--dense-layers": WHOLE, "--chunk": ("0", *WHOLE),
        "--min-prefill-tokens": WHOLE, "--block-size": ("0", *WHOLE), "--tensor-parallel-size": ("0", *WHOLE),
        "--text": ("/nowhere", "/", "", "a\x00b", "x" * 5000),
    },
    "eval": {
        "--policies": ("", ",", "quset"),
        "--budgets": ("", "0", "512,-1", "512,,nan", "1e3", "x", LONG, "10000000000"),
        "--prefill-policies": ("", "slash"), "--top-p": ("", "nan", "inf", "-1", "x"),
        "--tasks": ("", ",", "needle"), "--lengths": ("", "0", "-1", "nan", "4096,x", "10000000000"),
        "--passages": ("0", "10001", *WHOLE), "--score-tokens": ("0", *WHOLE), "--needles": ("0", "10001", *WHOLE),
        "--recall-every": WHOLE, "--chunk": ("0", *WHOLE), "--batch": ("0", "1025", *WHOLE),
        "--squad": ("/nowhere", "/", "", "a\x00b", "x" * 5000), "--hotpotqa": ("/nowhere", "/", "", "a\x00b"),
        "--gpu-memory-utilization": ("0", "1.5", "-1", "nan", "inf", "x", "", LONG),
        "--sparse": ("", "{", "[]", "null", '{"a": ' * 9000, '{"sink_tokens": 1, "sink_tokens": 2}'),
        "--block-size": ("0", *WHOLE), "--tensor-parallel-size": ("0", *WHOLE),
        "--text": ("/nowhere", "/", "", "a\x00b", "x" * 5000),
    },
}  # fmt: skip


@pytest.mark.parametrize("command", OPTIONS)
def test_tune_and_eval_refuse_wrong_values(command, model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from vllm_sparse.tools import commands

    # The model is looked at after what needs none, but before the text.
    monkeypatch.setattr(commands, "model_config", lambda args: commands.sample_text(args.text))
    monkeypatch.setattr(commands, "settle_cpu", lambda: None)
    for option, values in OPTIONS[command].items():
        for value in values:
            more = ["--decode"] if option in ("--budget-tokens", "--dense-layers") else []
            out = f"--out={tmp_path / 'out.jsonl'}"
            said = refusal(capsys, command, model, out, *more, f"{option}={value}")
            named = {"--policies": "decode_policy", "--prefill-policies": "prefill_policy"}.get(option, option)
            assert option in said or named in said, (option, value, said)
            assert "allowed" in said.casefold(), (option, value, said)


@pytest.mark.parametrize("command", ["tune", "tune --decode", "eval"])
@pytest.mark.engine
def test_unwritable_places_are_refused_early(tiny, command, tmp_path, monkeypatch, capsys):
    """Places that cannot be written are refused first."""
    pytest.importorskip("matplotlib")
    from vllm_sparse.tools import commands

    monkeypatch.setattr(commands, "tokenizer", lambda *args: pytest.fail("too late"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "page.html").mkdir()
    (tmp_path / "half.json.partial").mkdir()
    text = tmp_path / "text.txt"
    text.write_text("Some words. " * 9000)
    for place in (
        tmp_path / "folder", tmp_path / "file" / "x", tmp_path / "pipe", tmp_path / ("x" * 300), "", "/",
        "/proc/nowhere/x", tmp_path / "a\x00b",
        tmp_path / ("page.jsonl" if command == "eval" else "half.json"),
    ):  # fmt: skip
        said = refusal(capsys, *command.split(), tiny.model(), "--text", text, f"--out={place}")
        assert "--out: " in said and "allowed" in said, (place, said)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000 + b"\n", b'"x"\n', b"{}\n"])
def test_files_that_are_no_results(content, tmp_path):
    """Files that are no results are not continued."""
    from vllm_sparse.tools.eval.rows import Rows

    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"--out: line 1 of .* is no result"):
        Rows(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"arguments": 1, "passages": 2}', "\x00"])
def test_foreign_partial_measurements(content, tmp_path, capsys):
    """Partial measurements of other kinds are not continued."""
    from vllm_sparse.tools.tune.command import Partial

    path = tmp_path / "x.partial"
    path.write_text(content)
    assert Partial(path, {"model": "m"}).passages == []
    assert "contents that are no measurement: starting afresh" in capsys.readouterr().out


def test_option_types_say_what_is_allowed():
    parser = Parser()
    parser.add_argument("--whole", type=whole(2, 5))
    parser.add_argument("--real", type=real(0, 1, above=True))
    parser.add_argument("--several", type=several(whole(1)))
    parser.add_argument("--object", type=json_object)
    arguments = parser.parse_args(["--whole=5", "--real=1", "--several=1, 2,", '--object={"a": 1}'])
    assert vars(arguments) == {"whole": 5, "real": 1.0, "several": [1, 2], "object": {"a": 1}}
    for words, said in (
        ("--whole=6", "--whole: 6; allowed: 2 or more, up to 5, in whole numbers"),
        ("--whole=x\n", r"--whole: 'x\n'; allowed: 2 or more, up to 5, in whole numbers"),
        ("--real=0", "--real: 0; allowed: above 0, up to 1"),
        ("--several=1,0", "--several: 0; allowed: 1 or more, up to 2147483647, in whole numbers"),
        ("--object=[]", "--object: []; allowed: a JSON object such as {}"),
    ):
        with pytest.raises(ConfigError) as refused:
            parser.parse_args([words])
        assert str(refused.value) == said
    with pytest.raises(SystemExit):
        parser.parse_args(["--unknown"])


def command_of(words: str, run: str, **more) -> subprocess.Popen:
    """The command in a process of its own, where ``vllm-sparse plan`` does what ``run`` says."""
    code = f"import sys; from vllm_sparse.tools import cli, plan\nplan.run = lambda args: {run}\n"
    code += "sys.exit(cli.main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *words.split()], text=True, stderr=subprocess.PIPE, **more
    )


@pytest.mark.parametrize("words", ["--help", "plan m --gpu 1 --host 1"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_no_error(words, unbuffered):
    reads, writes = os.pipe()
    os.close(reads)
    more = {"stdout": writes, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
    process = command_of(words, "print('some')", **more)
    os.close(writes)
    said = process.communicate()[1]
    # argparse itself passes over a pipe that is closed already.
    assert process.returncode in ((0, 141) if words == "--help" else (141,))
    assert "BrokenPipe" not in said


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_takes_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        more = {"stdout": full, "env": {**os.environ, "PYTHONUNBUFFERED": unbuffered}}
        process = command_of("plan m --gpu 1 --host 1", "print('some')", **more)
        said = process.communicate()[1]
    assert said.endswith("vllm-sparse: cannot write: [Errno 28] No space left on device\n")
    assert "Traceback" not in said
    assert process.returncode == 1


def test_interrupts_take_one_line(model, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    from vllm_sparse.tools import commands

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(commands, "model_config", interrupted)
    assert cli.main(["plan", str(model), "--gpu=1", "--host=1"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "vllm-sparse: interrupted"
    assert cli.main(["eval", str(model), f"--out={model / 'x.jsonl'}"]) == 130
    assert "interrupted; the same command continues there" in capsys.readouterr().err


def test_closed_streams_are_none(model, monkeypatch):
    """As Python has them where the shell was told ``>&-``."""
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["plan", "/nowhere", "--gpu=1", "--host=1"]) == 1


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"vllm-sparse {vllm_sparse.__version__}\n"
