"""`vllm-sparse eval`: what a budget costs in quality, measured through the real engine.

- ``command``  arguments, and the loop over tasks, samples and settings
- ``settings`` policies, budgets and shares that are compared
- ``samples``  passages and RULER prompts of a length, half of the text for ``dev``, half for ``report``
- ``ruler``    the prompts themselves, and their score
- ``engine``   one vLLM engine that runs all settings
- ``force``    the logits processor that feeds a text's own tokens to decode steps
- ``worker``   what runs in vLLM's workers: the switch between settings
- ``recall``   attention mass of chosen pages beside that of the best ones
- ``rows``     JSON lines that a later run continues
- ``summary``  means and losses of rows, and how loss grows with length and budget
- ``report``   one HTML page of them
"""
