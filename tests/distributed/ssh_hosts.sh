#!/usr/bin/env bash
# "Hosts" for --hosts FILE on the loopback, by OpenSSH's own sshd, with keys of its own.
#
#   apt-get install --no-install-recommends openssh-server openssh-client
#   tests/distributed/ssh_hosts.sh start FOLDER    and then: export PATH=FOLDER/bin:$PATH
#   printf 'alpha slots=2\nbeta\n' > hosts
#   tpctl batch prompts.jsonl -o rows/ --hosts hosts
#   tests/distributed/ssh_hosts.sh stop FOLDER
#
# FOLDER/bin/ssh is ssh with a configuration in which alpha, beta and gamma are this machine, and delta a port of it at
# which nobody listens. Nothing of the user's own configuration is read or changed.
set -euo pipefail

command=${1:-}
folder=$(mkdir -p "${2:?a folder is wanted}" && cd "$2" && pwd)

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }

start() {
    port=$(free_port)
    mkdir -p "$folder/bin"
    chmod 700 "$folder"
    for key in host user; do
        [ -f "$folder/$key" ] || ssh-keygen -q -t ed25519 -N '' -f "$folder/$key"
    done
    cp "$folder/user.pub" "$folder/authorized"
    cat >"$folder/sshd_config" <<END
Port $port
ListenAddress 127.0.0.1
HostKey $folder/host
PidFile $folder/sshd.pid
AuthorizedKeysFile $folder/authorized
PasswordAuthentication no
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
PrintMotd no
MaxStartups 100
END
    cat >"$folder/config" <<END
Host alpha beta gamma
    Port $port
Host delta
    Port $(free_port)
Host *
    HostName 127.0.0.1
    IdentityFile $folder/user
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile $folder/known
    LogLevel ERROR
END
    printf '#!/bin/sh\nexec %s -F %s/config "$@"\n' "$(command -v ssh)" "$folder" >"$folder/bin/ssh"
    chmod +x "$folder/bin/ssh"
    mkdir -p /run/sshd # where it separates privileges
    "$(command -v sshd || echo /usr/sbin/sshd)" -f "$folder/sshd_config" -E "$folder/sshd.log"
}

stop() {
    [ ! -f "$folder/sshd.pid" ] || kill "$(cat "$folder/sshd.pid")"
}

case $command in
start | stop) $command ;;
*)
    echo "usage: $0 start|stop FOLDER" >&2
    exit 2
    ;;
esac
