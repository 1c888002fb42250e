"""All that is read: models, tokenizers, text and the calibration set."""
