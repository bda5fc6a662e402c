#!/bin/sh
# Installs what the tests of this directory need, where it may: root on Debian or Ubuntu. They skip what is missing.
missing=''
command -v pdsh >/dev/null || missing="$missing pdsh"
command -v ip >/dev/null || [ -x /usr/sbin/ip ] || missing="$missing iproute2"
[ -x /usr/sbin/sshd ] || missing="$missing openssh-server"
[ -x /usr/sbin/slurmctld ] || missing="$missing slurm-wlm"
[ -x /usr/sbin/munged ] || missing="$missing munge"
command -v ompi_info >/dev/null || missing="$missing openmpi-bin"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not installed:$missing (needs root and apt-get)"
    exit 0
fi
# packages must not start their daemons here
policy=/usr/sbin/policy-rc.d
[ -e $policy ] || { printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy && trap 'rm -f $policy' EXIT; }
# shellcheck disable=SC2086
apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $missing >/dev/null ||
    echo "could not be installed:$missing"
exit 0
