"""What the runs of a results folder come to: means, intervals and tests, beside the published scores."""
