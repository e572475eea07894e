#!/bin/sh
# Starts the command of a container with its secrets in the environment.
#
# For each name below, NAME_FILE may name a file (a Docker secret); NAME is then set to what is in it,
# in this process and its children only. So a secret is in no image and no compose file, and
# `docker inspect` does not show it. Ray reads its token from a file by itself (RAY_AUTH_TOKEN_PATH).
set -eu

for name in \
    MLFLOW_TRACKING_PASSWORD \
    MLFLOW_AUTH_ADMIN_PASSWORD \
    MLFLOW_FLASK_SERVER_SECRET_KEY \
    PGPASSWORD \
    AWS_ACCESS_KEY_ID \
    AWS_SECRET_ACCESS_KEY; do
    eval "file=\${${name}_FILE:-}"
    [ -n "$file" ] || continue
    if [ ! -s "$file" ] || [ ! -r "$file" ]; then
        echo "llp-entrypoint: ${name}_FILE names $file, which is empty or cannot be read" >&2
        exit 4
    fi
    value=$(cat "$file")
    export "$name=$value"
    unset "${name}_FILE"
done

exec "$@"
