"""The tasks of `vllm-sparse eval`: what they ask, how answers are scored, and which texts and files will do."""

from __future__ import annotations

import gzip
import json
from difflib import SequenceMatcher
from pathlib import Path

import pytest
from eval_cases import Chat, Letters, row, running_text

from vllm_sparse.errors import ConfigError
from vllm_sparse.tools.eval import many_turns, mrcr, pairs, problems, qa, ruler, tasks, trace
from vllm_sparse.tools.eval.problems import Problem, Source
from vllm_sparse.tools.eval.rows import Rows
from vllm_sparse.tools.eval.samples import MARK, Samples
from vllm_sparse.tools.eval.summary import Summary
from vllm_sparse.tools.eval.tasks import PREFILL_TEXT, PROBLEMS, RENAMED, TEXT

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SOURCE = Source.of(running_text())
ANSWERS = {"niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3}
OFFLINE = [name for name, task in PROBLEMS.items() if task.needs == "text"]


def size(found: Problem) -> int:
    """Characters of a problem, with all of its turns."""
    before = sum(len(asked) + len(said) for asked, said in found.history)
    return len(found.text + found.answer_start) + before + sum(map(size, found.follow_ups))


def problem(task: str, limit: int = 12000, seed: str = "a", place: float = 0.5) -> Problem:
    return problems.fitted(task, PROBLEMS[task], SOURCE, limit, seed, place, size)


def needles_of(text: str) -> dict[str, str]:
    """Value by key of the needles in a text."""
    lines = [line.split(" for ")[1].split(" is: ") for line in text.split("One of the special magic ")[1:]]
    return {key: value.split(".")[0] for key, value in lines}


def test_all_tasks_of_ruler():
    """The names are RULER's, and old ones and groups mean tasks that there are."""
    niah = [f"niah_{kind}_{n}" for kind in ("single", "multikey") for n in (1, 2, 3)]
    others = ["niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    assert list(tasks.GROUPS["ruler"]) == [*niah, *others]
    assert tasks.named(["niah_single", "niah_multikey", "niah_single_2"], set()) == [
        "niah_single_2",
        "niah_multikey_1",
    ]
    assert tasks.named(["ruler"], set()) == [name for name in tasks.GROUPS["ruler"] if not name.startswith("qa")]
    assert tasks.named(["ruler"], {"hotpotqa"})[-1] == "qa_2" and TEXT in tasks.named(["all"], set())
    assert set(tasks.named(["all"], {"squad", "hotpotqa"})) == {*tasks.TASKS} - {PREFILL_TEXT}
    with pytest.raises(ConfigError, match=r"--tasks: 'needle'; allowed: text, .*niah_single_1.*mrcr.*niah_single"):
        tasks.named(["needle"], set())
    with pytest.raises(ConfigError, match=r"--tasks: qa_1 .* --squad FILE"):
        tasks.named(["qa_1"], {"hotpotqa"})


@pytest.mark.parametrize("task", OFFLINE)
def test_problems_fill_their_length(task):
    """Problems fill their length and depend on the seed alone; a right answer is scored 1, and none 0."""
    found = problem(task)
    assert found == problem(task) and found != problem(task, seed="b")
    assert 0.9 * 12000 < size(found) <= 12000
    score = PROBLEMS[task].score
    assert score("", found.answers) == 0
    right = {"mrcr": "".join, "trace": "\n".join}.get(task.split("_")[0], " ".join)(found.answers)
    assert score(right.removeprefix("Step 1:"), found.answers) == 1
    assert all(answer not in found.answer_start for answer in found.answers)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_answers_of_ruler_are_in_the_text(task):
    found = problem(task)
    assert len(set(found.answers)) == len(found.answers) == ANSWERS.get(task, 1)
    assert all(answer in found.text for answer in found.answers)
    assert PROBLEMS[task].score(" ".join(found.answers).upper(), found.answers) == 1, "in any case"


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_single_3"])
def test_needle_lies_at_its_depth(task):
    for depth in (0.0, 0.25, 0.5, 1.0):
        found = problem(task, 20000, place=depth)
        begin, end = found.text.index("\n"), found.text.rindex("\n")
        assert (found.text.index("One of the special") - begin) / (end - begin) == pytest.approx(depth, abs=0.02)
        assert found.depth == depth
    assert (ruler.NOISE in found.text) == (task == "niah_single_1")
    assert (len(found.answers[0]) == 36) == (task == "niah_single_3"), "a UUID has 36 characters"


@pytest.mark.parametrize("task, asked", [("niah_multikey_1", 1), ("niah_multiquery", 4), ("niah_multivalue", 1)])
def test_needles_of_several_keys(task, asked):
    """Keys that are asked for are those of the answers."""
    found = problem(task)
    assert found.text.count("One of the special") == 4 and found.depth is None
    question = found.text[found.text.rindex("\n") :]
    keys = needles_of(found.text)
    assert sum(key in question for key in keys) == asked
    for key, value in keys.items():
        assert (key in question) == (value in found.answers) or task == "niah_multivalue"


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_haystacks_of_needles(task):
    """All lines are needles of different keys, and one of them is asked for."""
    found = problem(task)
    lines = found.text.split("\n")[1:-1]
    assert len(lines) > 50 and all(line.startswith("One of the special magic") for line in lines)
    keys = needles_of(found.text)
    asked = [key for key in keys if f" for {key} mentioned" in found.text]
    assert len(asked) == 1 and keys[asked[0]] == found.answers[0]


def test_chains_and_word_counts():
    """Chains are in order, and words are as frequent as RULER's."""
    found = problem("vt")
    body = found.text.rpartition("Memorize and track")[2]
    places = [body.index(f"VAR {name} = ") for name in found.answers]
    assert places == sorted(places)
    body = problem("cwe", 20000)
    listed = body.text.rpartition("Below is a numbered list")[2].split()
    counts = {word: listed.count(word) for word in set(listed) if word.islower() and len(word) == 5}
    assert {word for word, count in counts.items() if count == ruler.COMMON_TIMES} == set(body.answers)
    assert set(counts.values()) <= {ruler.COMMON_TIMES, ruler.OTHER_TIMES, 1, 2}
    body = problem("fwe")
    coded = [word for word in body.text.split() if word != "...."]
    ranked = sorted(set(coded), key=coded.count, reverse=True)
    assert ranked[:3] == list(body.answers)


def test_shares_of_answers():
    """All answers count in RULER's retrieval, any one in its questions."""
    assert problems.all_of("They are ABC and 12.", ("abc", "12", "7", "34")) == 0.5
    assert problems.any_of("They are ABC and 12.", ("abc", "7")) == 1 and problems.any_of("none", ("abc",)) == 0


def test_unsuitable_texts_are_refused():
    """Texts too poor or too long are refused."""
    with pytest.raises(ConfigError, match=r"--lengths: 100 .* vt; allowed: from about"):
        problem("vt", 100)
    poor = Source.of("Two words.")
    with pytest.raises(ConfigError, match="--text: too few sentences"):
        problems.fitted("niah_single_2", PROBLEMS["niah_single_2"], poor, 900, "a", 0.5, lambda p: 1)
    with pytest.raises(ConfigError, match="--text: too little for cwe"):
        problem("cwe", 10**7)
    with pytest.raises(ConfigError, match="half for --split dev are too few for 2 passages of 900"):
        Samples(Letters(), "a" * 1000, "dev", 2, 16).make(TEXT, 900, 0)


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Context {number} says word{number} or term{number}. " + "Filler. " * 20,
                    "qas": [
                        {
                            "question": f"What says {number}?",
                            "answers": [
                                {"text": f"word{number}"},
                                {"text": f"term{number}"},
                                {"text": f"word{number}"},
                            ],
                        },
                        {"question": "What is impossible?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(100, 150)
            ]
        }
    ]
}
HOTPOTQA = [
    {
        "question": f"What says {number}?",
        "answer": f"word{number}",
        "context": [
            [f"Title {number}", [f"It says word{number}. ", "Filler. " * 20]],
            [f"Other {number}", ["No."]],
        ],
    }
    for number in range(100, 150)
]


@pytest.mark.parametrize("task, option, content", [("qa_1", "squad", SQUAD), ("qa_2", "hotpotqa", HOTPOTQA)])
def test_questions_of_a_file(task, option, content, tmp_path):
    """Questions stand behind their documents and others; halves of a file share neither."""
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(content))
    halves = {split: qa.read(path, option, split) for split in ("dev", "report")}
    assert not set(halves["dev"].documents) & set(halves["report"].documents)
    assert [len(half.questions) for half in halves.values()] == [25, 25]
    for split in halves:
        samples = Samples(Letters(), running_text(), split, 1, 16, {option: halves[split]})
        found = ["".join(map(chr, samples.make(task, 3000, seed).tokens)) for seed in range(5)]
        made = samples.make(task, 3000, 0)
        assert len(set(found)) == 5 and made.answers[0] in found[0] and f"says {made.answers[0][-3:]}?" in found[0]
        assert found[0].count("\nDocument ") > 5 and found[0].endswith("Answer:")
        assert len(made.tokens) + made.max_tokens <= 3000
    assert ("term100" in halves["dev"].questions[0].answers) == (option == "squad")
    with pytest.raises(ConfigError, match=f"--{option}: too little for {task} at 90000 tokens"):
        samples.make(task, 90000, 0)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": 1}', '[{"question": "a"}]', "\x00"])
def test_files_that_hold_no_questions(content, tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(content)
    for option, name in qa.NAMES.items():
        with pytest.raises(ConfigError, match=f"--{option}: .*(JSON as of {name}|allowed: more)"):
            qa.read(path, option, "dev")


@pytest.mark.parametrize("needles", [2, 4, 8])
def test_conversations(needles):
    """A conversation has the request as often as it says, with different replies, and asks for one of them."""
    found = problem(f"mrcr_{needles}", 20000)
    prefix, reply = found.answers
    ordinal = int(found.text.split(" to the ")[1][0])
    asked = found.text.split("(1 indexed) ")[1].split(". Do not")[0]
    replies = [said for request, said in found.history if request == f"Write a {asked}"]
    assert len(replies) == len(set(replies)) == needles and replies[ordinal - 1] == reply
    assert f"Prepend {prefix} to the" in found.text and len(prefix) == 10
    assert len({said for _, said in found.history}) == len(found.history) > 3 * needles
    assert {problem(f"mrcr_{needles}", seed=str(n)).text.split(" to the ")[1][:3] for n in range(40)} == {
        f"{n}{end}" for n, end in zip(range(1, needles + 1), ("st", "nd", "rd", *["th"] * 5), strict=False)
    }


def test_score_of_conversations():
    """The prefix first, then how alike the rest is, as in OpenAI's MRCR."""
    answers = ("aB3", "one two three")
    assert mrcr.score("aB3one two three", answers) == 1
    assert mrcr.score("one two three", answers) == 0 == mrcr.score(" aB3one two three", answers)
    near = mrcr.score("aB3one two four", answers)
    assert near == SequenceMatcher(None, "one two four", "one two three").ratio() and 0.5 < near < 1


def test_turns_share_a_text():
    """Each turn asks for keys of its own, all of which are in the text of the first."""
    found = problem("many_turns")
    turns = [found, *found.follow_ups]
    values = needles_of(found.text)
    assert len(turns) == many_turns.TURNS and len(values) == many_turns.TURNS * many_turns.KEYS
    for turn in turns:
        asked = [key for key in values if f" {key}" in turn.answer_start]
        assert [values[key] for key in asked] and {values[key] for key in asked} == set(turn.answers)
    assert len({answer for turn in turns for answer in turn.answers}) == len(values)


@pytest.mark.parametrize("tokenizer", [Letters(), Chat()])
def test_follow_ups_join_the_answer(tokenizer):
    """A later turn's tokens are what stands between the model's own answer and where it goes on."""
    samples = Samples(tokenizer, running_text(), "dev", 1, 16)
    made = samples.make("many_turns", 12000, 0)
    total = len(made.tokens) + sum(len(turn.tokens) for turn in made.turns) + made.answer_tokens
    assert 0.9 * 12000 < total <= 12000
    chat = bool(tokenizer.chat_template)
    assert made.end == ((ord("<"),) if chat else ())
    for turn in made.turns:
        said = "".join(map(chr, turn.tokens))
        assert said.startswith("</><user>What are all" if chat else "\nWhat are all") and MARK not in said
        assert said.endswith(" mentioned in the provided text are")


@pytest.mark.parametrize("tokenizer", [Letters(), Chat()])
def test_conversations_are_rendered(tokenizer):
    """All turns stand before the question, and the answer begins with nothing given."""
    made = Samples(tokenizer, running_text(), "dev", 1, 16).make("mrcr_2", 6000, 0)
    said = "".join(map(chr, made.tokens))
    chat = bool(tokenizer.chat_template)
    assert said.endswith("response.</><assistant>" if chat else "response.\nAssistant:\n")
    assert said.count("<assistant>Th" if chat else "\nAssistant:\nTh") > 10


def test_programs_are_traced():
    """Lines are right by what the answer itself said before; a wrong result costs one line."""
    found = problem("trace", 20000)
    text = "\n".join(found.answers)
    for line in found.answers:
        instruction = line.split(" = ")
        assert f"{instruction[0]} = {instruction[1]}" in found.text, "the step is in the text"
    assert len(found.answers) == 48 and sum("%" in line for line in found.answers) == 40
    score, last = trace.score, found.answers[-1]
    assert score(text, found.answers) == 1
    assert score(text.removeprefix("Step 1:"), found.answers) == 1, "the label is given"
    assert score("\n".join(found.answers[:24]), found.answers) == 0.5
    assert score(text.replace(last, last[:-2] + ("1" if last[-2] != "1" else "2") + "."), found.answers) == 47 / 48
    assert score(f"{text}\n{text.replace('=', '= 1')}", found.answers) == 1, "a line counts as first written"


def test_errors_are_carried_along():
    """A wrong value is that of its variable from then on."""
    answers = ("Step 1: a = 5.", "Step 2: b = (a + a) % 100 = (5 + 5) % 100 = 10.",
               "Step 3: a = (b - a) % 100 = (10 - 5) % 100 = 5.")  # fmt: skip
    wrong = " a = 5.\nStep 2: b = (a + a) % 100 = (5 + 5) % 100 = 11.\n"
    assert trace.score(f"{wrong}Step 3: a = (b - a) % 100 = (11 - 5) % 100 = 6.", answers) == pytest.approx(2 / 3)
    assert trace.score(f"{wrong}Step 3: a = (b - a) % 100 = (10 - 5) % 100 = 5.", answers) == pytest.approx(1 / 3)
    assert trace.score(" a = 5.\nStep 3: a = (b - a) % 100 = (10 - 5) % 100 = 5.", answers) == pytest.approx(1 / 3)
    assert trace.score(f" a = {'5' * 5000}", answers) == 0
    assert trace.score(" x = 7.\nStep 3: x = 8.", ("Step 2: x = 7.", "Step 3: x = 9.")) == 0.5


def test_rows_of_old_names(tmp_path):
    """Rows of before tasks were renamed are continued and shown under their new names."""
    path = tmp_path / "rows.jsonl"
    rows = [row("dense", None, old, score=1.0) for old in RENAMED]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    for one, new in zip(rows, RENAMED.values(), strict=True):
        assert Rows(path).has(one | {"task": new, "more": None})
    summary = Summary(rows)
    assert summary.tasks == sorted(RENAMED.values(), reverse=True)
    for old, new in RENAMED.items():
        assert (
            summary.mean(summary.settings[0], old, "score") == summary.mean(summary.settings[0], new, "score") == 1
        )


@pytest.mark.parametrize("path", sorted(RESULTS.glob("eval*.jsonl*")), ids=lambda path: path.name)
def test_committed_rows_are_read(path):
    """Rows of all versions are of tasks and settings that there are."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    for model in {one["model"] for one in rows}:
        own = [one for one in rows if one["model"] == model]
        summary = Summary(own)
        assert {RENAMED.get(one["task"], one["task"]) for one in own} == set(summary.tasks)
        assert len(list(pairs.lines(summary))) >= len(summary.settings)
        assert summary.settings[0].is_dense
