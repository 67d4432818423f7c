"""What a run carries, keeps and shows: state, checkpoints, processes, evaluation, pictures and the log."""
