"""What every training script needs and no equation does: settings, processes, the run's folder, states, files, errors."""
