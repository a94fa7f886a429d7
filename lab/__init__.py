"""What surrounds the method: batches, checkpoints, a run's folder, evaluation, reports."""
