#!/usr/bin/env bash
# The first process of a host of the test: gives it a disk of its own where programs write, then sshd.
#   host.sh DIRECTORY SETUP KEEP...    KEEP are paths that stay visible even below /tmp
set -euo pipefail
directory=$1 setup=$2
shift 2
mount --make-rprivate /
hostname "$(basename "$directory")"

own() { # own PATH USER: PATH is a directory of this host from here on
  mkdir -p "$directory/disk$1" "$1"
  chown "$2" "$directory/disk$1"
  mount --rbind "$directory/disk$1" "$1"
}
for path in "$@"; do
  case $path in
    /tmp/*) mkdir -p "$directory/disk$path" && mount --bind "$path" "$directory/disk$path" ;;
  esac
done
own /tmp root
chmod 1777 /tmp
own /run/sshd root
mount -t tmpfs tmpfs /dev/shm

# "~" is a directory of this host, while the real home stays where a Python installation may lie.
mkdir -p "$directory/home/.ssh"
sed "s|^root:.*|root:x:0:0:root:$directory/home:/bin/bash|" /etc/passwd >"$directory/passwd"
mount --bind "$directory/passwd" /etc/passwd

# Names are the hosts' own; whoever asks for another is told at once that there is none.
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$(hostname)" >"$directory/hosts"
echo 'nameserver 127.0.0.1' >"$directory/resolv.conf"
mount --bind "$directory/hosts" /etc/hosts
mount --bind "$directory/resolv.conf" /etc/resolv.conf

eval "$setup"

ssh-keygen -q -t ed25519 -N '' -f "$directory/host_key"
cat >"$directory/sshd_config" <<END
HostKey $directory/host_key
AuthorizedKeysFile $directory/../key.pub
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
MaxStartups 50:30:100
END
# Not exec: the first process of a host also has to bury its orphans, which a shell does.
/usr/sbin/sshd -D -e -f "$directory/sshd_config" &
touch "$directory/ready"
wait
