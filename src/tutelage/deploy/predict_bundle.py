"""Build predict.py, one file that runs an export folder anywhere, from the code of `tutelage predict`."""

from __future__ import annotations

import ast
import inspect

from tutelage import errors, image_size, json_object, regular_file
from tutelage.data import decode, image_kinds, upsample, walk
from tutelage.deploy import export_contents, predict_cli, predict_masks, prediction_files, runtime

# Each imports only from those before it.
PARTS = (
    errors,
    image_size,
    json_object,
    regular_file,
    image_kinds,
    decode,
    walk,
    upsample,
    export_contents,
    runtime,
    prediction_files,
    predict_masks,
    predict_cli,
)

OPENING = '''"""Classify images with the model in this folder:  python predict.py IMAGES_OR_FOLDERS... --out predictions.csv

Needs numpy, pillow and onnxruntime, nothing else. It is the code of `tutelage predict` {version} in one file, with the decode and
resize that the model was trained and evaluated with. Copyright the authors of Tutelage, Apache-2.0.
"""
'''
ENDING = """

if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent))
"""


def predict_file(version: str) -> str:
    """The text of predict.py.

    Args:
        version: of tutelage.
    """
    imports: dict[str, None] = {}
    bodies = []
    for module in PARTS:
        text = inspect.getsource(module)
        lines = text.split("\n")
        dropped: set[int] = set()
        for number, node in enumerate(ast.parse(text).body):
            rows = range(node.lineno - 1, node.end_lineno or node.lineno)
            if isinstance(node, ast.Import | ast.ImportFrom):
                source = "\n".join(lines[row] for row in rows)
                if "tutelage" not in source.split()[1]:
                    imports[source] = None
                dropped |= set(rows)
            elif number == 0 and isinstance(node, ast.Expr):  # the module's docstring becomes a comment
                dropped |= set(rows)
                docstring = ast.literal_eval(node.value).strip().split("\n")
                bodies.append("\n".join(f"# {line}".rstrip() for line in docstring))
        bodies.append("\n".join(line for row, line in enumerate(lines) if row not in dropped).strip("\n"))
    first = sorted(imports, key=lambda line: (not line.startswith("from __future__"), line))
    return OPENING.format(version=version) + "\n" + "\n".join(first) + "\n\n\n" + "\n\n\n".join(bodies) + ENDING
