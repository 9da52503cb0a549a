#!/usr/bin/env bash
# What the cluster files beside this one run on each machine: Debian or Ubuntu with Python 3.11 or newer, and sudo.
#
#   node.sh setup PYPROJECT [PACKAGE...]   makes the environment ~/rotssl-env
#   node.sh profile                        puts it on the PATH of all shells, which Ray's launcher needs
#   node.sh serve                          exports this machine's /shared to the others (NFS)
#   node.sh mount HOST:/PATH               mounts that as /shared
#   node.sh mlflow                         starts an MLflow server, with its database and artifacts in ~/mlflow
#   node.sh address                        prints this machine's address within its network
set -euo pipefail
RAY_VERSION=${RAY_VERSION:-2.60.0}
ENVIRONMENT=${ENVIRONMENT:-$HOME/rotssl-env}
SHARED=${SHARED:-/shared}
PORT=${PORT:-5000}

apt_install() {
    # A new machine's own updates hold the lock in its first minutes.
    local get=(sudo DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=600 -qq)
    "${get[@]}" update
    "${get[@]}" install --yes --no-install-recommends "$@" >/dev/null
}

setup() {
    local project=$1
    shift
    if [ ! -x "$ENVIRONMENT/bin/uv" ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "$(python3 --version), but 3.11 or newer is needed: choose an image that has it, such as Ubuntu 24.04's" >&2
            exit 1
        }
        apt_install python3-venv python3-dev g++
        python3 -m venv "$ENVIRONMENT"
        "$ENVIRONMENT/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9"
    fi
    # A machine without a GPU need not have CUDA's libraries.
    local backend=()
    nvidia-smi >/dev/null 2>&1 || backend=(--torch-backend cpu)
    "$ENVIRONMENT/bin/uv" pip install --quiet --python "$ENVIRONMENT/bin/python" --compile-bytecode "${backend[@]}" \
        --requirements "$project" "ray[default,train,tune]==$RAY_VERSION" "$@"
}

profile() {
    local line="export PATH=$ENVIRONMENT/bin:\$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"
    grep -qxF "$line" "$HOME/.bashrc" || echo "$line" >>"$HOME/.bashrc"
}

serve() {
    sudo install -d -o "$(id -u)" -g "$(id -g)" "$SHARED"
    # The cloud's firewall lets in only the machines of the cluster. Written before there is a server, so that no mount of another
    # machine finds a server without the folder.
    local line="$SHARED *(rw,sync,no_subtree_check)"
    grep -qsxF "$line" /etc/exports || echo "$line" | sudo tee -a /etc/exports >/dev/null
    apt_install nfs-kernel-server
    sudo exportfs -ra
}

mount_shared() {
    if mountpoint -q "$SHARED"; then return; fi
    apt_install nfs-common
    sudo mkdir -p "$SHARED"
    # hard: a server that is away is waited for, where soft would fail in the middle of a checkpoint. retry, in minutes: it may be
    # about to start.
    sudo mount -t nfs4 -o hard,noatime,retry=10 "$1" "$SHARED"
}

address() { hostname -I | awk '{print $1}'; }

mlflow_server() {
    local place=$HOME/mlflow here
    here=$(address)
    mkdir -p "$place"
    if [ -f "$place/pid" ] && kill -0 "$(cat "$place/pid")" 2>/dev/null; then return; fi
    MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false setsid nohup "$ENVIRONMENT/bin/mlflow" server \
        --host 0.0.0.0 --port "$PORT" --workers 2 --allowed-hosts "$here:$PORT,localhost:$PORT,127.0.0.1:$PORT" \
        --backend-store-uri "sqlite:///$place/mlflow.db" --artifacts-destination "$place/artifacts" \
        >"$place/server.log" 2>&1 </dev/null &
    echo $! >"$place/pid"
    # Its first start makes the tables, which takes a while.
    for _ in $(seq 120); do
        if curl --silent --fail --output /dev/null "http://$here:$PORT/health"; then return; fi
        kill -0 "$(cat "$place/pid")" 2>/dev/null || break
        sleep 1
    done
    tail -20 "$place/server.log" >&2
    exit 1
}

case "${1:-}" in
    setup) setup "${@:2}" ;;
    profile) profile ;;
    serve) serve ;;
    mount) mount_shared "$2" ;;
    mlflow) mlflow_server ;;
    address) address ;;
    *)
        sed -n '2,9p' "$0" | sed 's/^# \{0,1\}//'
        exit 2
        ;;
esac
