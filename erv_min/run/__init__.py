"""What every training script needs and no equation does: settings, processes, run folder, states, files, errors."""
