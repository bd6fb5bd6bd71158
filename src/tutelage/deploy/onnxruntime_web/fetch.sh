#!/usr/bin/env bash
# How the files in this folder were made: fetch onnxruntime-web from npm, check it, keep the two files that a page needs.
# To move to another version: change VERSION and SHA256, run it here, run tests/test_demo_page.py.
#
# Of the builds in the package this is the smallest that runs on the CPU: WebAssembly only (no WebGPU, WebGL or WebNN), with its
# loader inside the bundle, so that nothing has to be fetched and a page opened from a file works. xz makes the .wasm 2.2 MB
# where gzip -9 leaves 3.7 MB; a browser reads gzip only, so `tutelage demo-page` packs it anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

VERSION=1.30.0
SHA256=d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
npm pack --silent --pack-destination "$scratch" "onnxruntime-web@$VERSION" > /dev/null
echo "$SHA256  $scratch/onnxruntime-web-$VERSION.tgz" | sha256sum --check --quiet
tar -xzf "$scratch/onnxruntime-web-$VERSION.tgz" -C "$scratch"
cp "$scratch/package/dist/ort.wasm.bundle.min.mjs" .
xz -9e --stdout "$scratch/package/dist/ort-wasm-simd-threaded.wasm" > ort-wasm-simd-threaded.wasm.xz
echo "onnxruntime-web $VERSION, npm package with SHA-256 $SHA256" > VERSION
sha256sum ort.wasm.bundle.min.mjs ort-wasm-simd-threaded.wasm.xz >> VERSION
