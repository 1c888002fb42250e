"""All that is written: checkpoints, records, cards, and the journal of a run."""
