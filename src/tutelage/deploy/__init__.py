"""Export the student: ONNX files checked against PyTorch, and the code that runs them without torch."""
