"""Looking at a data set: lint, statistics, single samples, quarantine, what a run saw."""
