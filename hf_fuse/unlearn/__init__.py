"""Making a trained model forget samples: approximate methods, one that deletes exactly, and what to measure."""
