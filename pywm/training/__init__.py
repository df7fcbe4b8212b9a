"""What every algorithm's training uses: runs, checkpoints, logs, evaluation and reports."""
