"""The model on its way through the quantizer: checkpoints, one block at a time, calibration text, what linears see."""
