"""The data sets' own files, decoding ahead of the model, kept features, predictions."""
