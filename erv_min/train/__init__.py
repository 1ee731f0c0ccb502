"""What a training script needs and no equation does: settings, what a stage starts from, the run's folder, its states,
sharding, the optimizer, a policy's answers."""
