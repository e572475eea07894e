#!/bin/sh
# Makes the secrets that compose.yaml reads, each random, in docker/secrets/; existing ones stay.
#
#   docker/make-secrets.sh
#
# The folder is for its owner only (0700), which keeps other people of this machine out. The files in
# it are readable (0444), because Compose mounts them as they are, and users inside the containers have
# other numbers than you.
set -eu

folder=$(dirname "$0")/secrets
mkdir -p "$folder"
chmod 700 "$folder"
for name in \
    ray_token \
    mlflow_admin_password \
    mlflow_secret_key \
    postgres_password \
    s3_access_key \
    s3_secret_key; do
    file=$folder/$name
    if [ -s "$file" ]; then
        echo "$file stays"
        continue
    fi
    head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$file.new"
    chmod 444 "$file.new"
    mv "$file.new" "$file"
    echo "$file is new"
done
echo "MLflow: user admin, password in $folder/mlflow_admin_password"
