"""Programs that try to break ppgraph for longer than a test may take; docs/reliability.md says what each shows."""
