# Makes the virtual environment .venv at the repository's root, once; sourced by examples/quickstart.sh and tests/run.sh.
# make_environment EXTRAS: EXTRAS is empty or like [test]. PYTHON chooses the interpreter (3.10 to 3.13).

PRINT_VERSION='import sys; print("%d.%d" % sys.version_info[:2])'

make_environment() {
    local extras=$1 stamp
    make_venv || return
    # setup.py decides what is installed: the same file and the same extras need no second installation.
    stamp=.venv/installed$extras-$(cksum <setup.py | cut -d' ' -f1)
    [ -e "$stamp" ] && return 0
    install_packages "$extras" || {
        echo "error: pip could not install what is needed, for the reason above; where it reaches no package index, set" \
            "PIP_INDEX_URL to one, or PIP_FIND_LINKS to a folder of wheels, and start again" >&2
        return 2
    }
    touch "$stamp"
}

make_venv() {
    local python=${PYTHON:-python3} wanted found
    if [ -x .venv/bin/python ] && [ -z "${PYTHON:-}" ] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        return 0
    fi
    # Run and not looked up: pyenv has a command for every Python that it could install.
    wanted=$("$python" -c "$PRINT_VERSION" 2>/dev/null) || {
        echo "error: there is no $python that runs; set PYTHON to a Python from 3.10 to 3.13" >&2
        return 2
    }
    case $wanted in
    2.* | 3.[0-9])
        echo "error: $python is older than Python 3.10; set PYTHON to a newer one" >&2
        return 2
        ;;
    esac
    if [ -e .venv ]; then
        found=$(.venv/bin/python -c "$PRINT_VERSION" 2>/dev/null) || found="none that runs"
        [ "$wanted" = "$found" ] || {
            echo "error: $python is Python $wanted, and the Python of .venv is $found; move .venv" \
                "away (mv .venv .venv.old)${PYTHON:+, or leave PYTHON out}" >&2
            return 2
        }
        .venv/bin/python -m pip --version >/dev/null 2>&1 && return 0
    fi
    # Where one was begun and has no pip as well.
    "$python" -m venv .venv || {
        echo "error: $python makes no virtual environment, for the reason above; set PYTHON to one that does" >&2
        return 2
    }
}

install_packages() {
    local extras=$1 version=${CPU_TORCH_VERSION:-2.13.0} pip=".venv/bin/python -m pip install --quiet"
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
        if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
            $pip 'torch>=2.11' || return
        elif [ "$(uname)" = Linux ]; then
            # A CPU build: from wherever pip is set up to find one, or else from PyTorch's own index.
            $pip "torch==$version+cpu" 2>/dev/null ||
                $pip "torch==$version" --index-url https://download.pytorch.org/whl/cpu || return
        else
            $pip 'torch>=2.8' || return
        fi
    fi
    $pip -e ".$extras"
}
