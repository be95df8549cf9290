"""Files of somebody else in a folder, and what is in a folder."""

from pathlib import Path

# What lies beside: folders that look like draws, a network's and an adapter's files, a page
FOLDERS = ("2025-11-29_run", "7", "70b-lora", "my_lora")
NEIGHBORS = [f"{folder}/adapter_config.json" for folder in FOLDERS]
NEIGHBORS += ["9/notes.txt", "notes.txt", "README.md", "config.json"]


def tree(folder):
    """Every file below a folder by its name, and its bytes; and every folder."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def put(folder, names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")
