# Makes the virtual environment .venv at the repository's root, once; sourced by examples/quickstart.sh and tests/run.sh.
# make_environment EXTRAS: EXTRAS is empty or like [test]. PYTHON chooses the interpreter (3.10 to 3.13).

make_environment() {
    local extras=$1 stamp python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' || {
        echo "error: $python is older than Python 3.10; set PYTHON to a newer one" >&2
        return 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # setup.py decides what is installed: the same file and the same extras need no second installation.
    stamp=.venv/installed$extras-$(cksum <setup.py | cut -d' ' -f1)
    [ -e "$stamp" ] && return 0
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
            .venv/bin/python -m pip install --quiet 'torch>=2.11'
        elif [ "$(uname)" = Linux ]; then
            # A CPU build: from wherever pip is set up to find one, or else from PyTorch's own index.
            .venv/bin/python -m pip install --quiet "torch==${CPU_TORCH_VERSION:-2.13.0}+cpu" 2>/dev/null ||
                .venv/bin/python -m pip install --quiet "torch==${CPU_TORCH_VERSION:-2.13.0}" \
                    --index-url https://download.pytorch.org/whl/cpu
        else
            .venv/bin/python -m pip install --quiet 'torch>=2.8'
        fi
    fi
    .venv/bin/python -m pip install --quiet -e ".$extras"
    touch "$stamp"
}
