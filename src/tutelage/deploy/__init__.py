"""What ships: the student as ONNX files with proof, and what runs them without torch."""
