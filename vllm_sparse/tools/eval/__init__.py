"""`vllm-sparse eval`: what a budget costs in quality, through the real engine. docs/eval.md is its manual.

- ``command``    arguments, and what is refused before anything is measured
- ``settings``   policies, budgets and shares that are compared, and which of them one engine can run
- ``tasks``      all tasks by name; ``problems`` what a task is, and the longest problem that fits
- ``ruler``, ``qa``, ``mrcr``, ``many_turns``, ``trace``: the problems themselves, and their scores
- ``samples``    passages and prompts of a length, half of the text for ``dev``, half for ``report``
- ``run``        the loop over engines, tasks, samples and settings
- ``engine``     one vLLM engine that runs several settings
- ``estimate``   how long it will take
- ``force``      the logits processor that feeds a text's own tokens to decode steps
- ``worker``     what runs in vLLM's workers: the switch between settings
- ``recall``     attention mass of chosen pages beside that of the best ones
- ``rows``       JSON lines that a later run continues
- ``summary``    means and losses of rows, and how loss grows with length and budget
- ``pairs``      two settings on the same samples, with ``intervals``
- ``report``     one HTML page of them
"""
