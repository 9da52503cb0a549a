#!/usr/bin/env bash
# Makes cluster/.env, with a random password for everything that cluster/compose.yaml starts. An existing one is left as it is:
# its passwords are in the databases. DEVICE=cuda cluster/make-env.sh chooses the image with CUDA.
set -euo pipefail
file=$(cd "$(dirname "$0")" && pwd)/.env
if [ -e "$file" ]; then
    echo "$file is there already" >&2
    exit 0
fi
secret() { head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'; }
umask 077
# Written whole, so that what is interrupted leaves no half of it.
cat >"$file.part" <<ENV
DEVICE=${DEVICE:-cpu}
RAY_AUTH_TOKEN=$(secret)
POSTGRES_PASSWORD=$(secret)
MLFLOW_TRACKING_USERNAME=admin
MLFLOW_TRACKING_PASSWORD=$(secret)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret)
AWS_ACCESS_KEY_ID=rotssl
AWS_SECRET_ACCESS_KEY=$(secret)
ENV
mv "$file.part" "$file"
echo "wrote $file" >&2
