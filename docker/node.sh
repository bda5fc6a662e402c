#!/bin/sh
# A container as a host of launch=hostfile: an sshd for this user on port 2222, with a key that all containers share.
#   moetrain-node DIRECTORY-OF-KEYS [COMMAND…]     runs the command, or waits
set -eu
keys=$1
shift
mkdir -p "$HOME/.ssh"
chmod 700 "$HOME/.ssh"
# whoever comes first makes the key; mkdir succeeds for one alone
if mkdir "$keys/making" 2>/dev/null; then
    ssh-keygen -q -t ed25519 -N '' -f "$keys/new"
    mv "$keys/new.pub" "$keys/id.pub"
    mv "$keys/new" "$keys/id"
fi
until [ -f "$keys/id" ]; do sleep 0.2; done
install -m 600 "$keys/id" "$HOME/.ssh/id_ed25519"
install -m 600 "$keys/id.pub" "$HOME/.ssh/authorized_keys"
printf 'Host *\n Port 2222\n StrictHostKeyChecking accept-new\n LogLevel ERROR\n' >"$HOME/.ssh/config"
ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/host" </dev/null 2>/dev/null || true
/usr/sbin/sshd -p 2222 -h "$HOME/.ssh/host" -o UsePAM=yes -o PidFile=none -o PasswordAuthentication=no \
    -o StrictModes=no -o AuthorizedKeysFile="$HOME/.ssh/authorized_keys"
if [ $# -gt 0 ]; then exec "$@"; fi
exec sleep infinity
