"""Training toward the predictions of a model in high precision (QAD)."""
