#!/usr/bin/env bash
# The Dockerfile's steps without a container engine, in a clean folder: build context, install, start, health, stop.
#   ops/image/run_steps.sh      (PYTHON=python3.11; installs from the package index that pip is set to)
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
server=
trap 'if [[ -n $server ]]; then kill "$server" 2>/dev/null || true; fi; rm -rf "$work"' EXIT

# What .dockerignore lets through, as committed or changed here, and nothing else.
mkdir "$work/build"
git ls-files -z -- pyproject.toml constraints.txt README.md matcher_service ops/image | xargs -0 cp --parents -t "$work/build"

cd "$work/build"
"${PYTHON:-python3}" -m venv "$work/opt"
"$work/opt/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check -c constraints.txt '.[cpu]'
cp ops/image/healthcheck.py "$work/opt/healthcheck.py"

# Out of the source tree: what runs is what was installed.
mkdir -m 0700 "$work/data" "$work/keys"
cd "$work"
export PATH="$work/opt/bin:$PATH" PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
export MATCHER_STORAGE__DATA_DIR="$work/data/data" MATCHER_STORAGE__KEYS_DIR="$work/keys/keys"
export MATCHER_SERVER__HTTP_PORT=${HTTP_PORT:-18080} MATCHER_SERVER__GRPC_PORT=${GRPC_PORT:-18081}
matcher serve &
server=$!
for _ in $(seq 60); do
    if python "$work/opt/healthcheck.py" 2>/dev/null; then break; fi
    sleep 0.5
done
python "$work/opt/healthcheck.py"
kill -TERM "$server"
wait "$server"
server=
echo "built, live, stopped in order"
