"""The command line: plan, eval, tune, and the demo."""
