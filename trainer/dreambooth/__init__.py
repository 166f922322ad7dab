"""The second paper: training subjects, many in a batch or each with a network of its own."""
