"""What a checkpoint is worth: control fidelity, prompt fidelity, and when control snapped into place."""
