"""Guidance: what is combined (combine, project, momentum), what counts as worse (perturb), when it acts (interval)."""
