"""Guidance in three questions: what is combined (combine), what counts as worse (perturb), when it acts (interval)."""
