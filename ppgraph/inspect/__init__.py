"""Looking into it: what pruning would do to a model (`explain`), what it did (`Report`), and each graph (`dump`)."""
