#!/usr/bin/env bash
# Set up what `make` needs. Running it again changes nothing.
# usage: setup.sh venv PYTHON DIR    the virtual environment with the CPU stack
#        setup.sh kafka DIR          Java, Maven, and the jars of one Kafka node in DIR/libs
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON_MIN=3.11
JAVA_MIN=17 # Kafka 4 brokers need it

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

may_install() { command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
apt() { as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >/dev/null; }

updated=
refresh() { # package lists, once per run
  if [ -z "$updated" ]; then apt update || say "apt-get update failed, continuing with the existing package lists"; fi
  updated=yes
}
install() { # install PACKAGE...: fails when it is not permitted or not possible
  may_install || return 1
  say "installing $* with apt-get"
  refresh
  apt install -y --no-install-recommends "$@"
}

first_available() { # prints the first of these packages that the package lists have
  local package
  for package; do
    if apt-cache show "$package" >/dev/null 2>&1; then echo "$package" && return; fi
  done
  return 1
}

# --- venv ---

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n1)" = "$2" ]; }

make_venv() {
  local python=$1 dir=$2 version
  command -v "$python" >/dev/null || die "$python not found: install Python $PYTHON_MIN or newer (apt-get install python3)"
  version=$(python_version "$python")
  at_least "$version" "$PYTHON_MIN" ||
    die "$python is $version, want $PYTHON_MIN or newer: install it and run make PYTHON=python$PYTHON_MIN"
  if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    install "python$version-venv" || die "$python cannot create virtual environments: apt-get install python$version-venv"
  fi
  # Create the environment again when its interpreter is missing or has another version.
  if [ "$(python_version "$dir/bin/python" 2>/dev/null)" != "$version" ]; then
    "$python" -m venv --clear "$dir"
  fi
  [ -x "$dir/bin/uv" ] || "$dir/bin/python" -m pip install -q -c deploy/constraints/cpu.txt uv
  "$dir/bin/uv" pip install -q --python "$dir/bin/python" -c deploy/constraints/cpu.txt -e '.[serve,plots,test]'
}

# --- kafka ---

java_major() { java -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p'; }
has_java() { command -v java >/dev/null && [ "$(java_major)" -ge "$JAVA_MIN" ] 2>/dev/null; }
install_java() {
  may_install || return 1
  refresh
  install "$(first_available openjdk-21-jre-headless openjdk-17-jre-headless)"
}

ensure_java_and_maven() {
  has_java || install_java || return 1
  command -v mvn >/dev/null || install maven || return 1
  has_java
}

copy_jars() {
  local dir=$1 fresh
  fresh=$(mktemp -d "$dir/.libs.XXXXXX")
  if ! mvn -B -q -f deploy/kafka/pom.xml dependency:copy-dependencies -DincludeScope=runtime \
    -DoutputDirectory="$fresh" >"$dir/maven.log" 2>&1; then
    rm -rf "$fresh"
    return 1
  fi
  rm -rf "$dir/libs"
  mv "$fresh" "$dir/libs" # all jars or none
  chmod 755 "$dir/libs"
  cp deploy/kafka/pom.xml "$dir/"
}

fetch_kafka() {
  local dir=$1 without="without it the demo replays a log instead, and tests that need a broker are skipped"
  mkdir -p "$dir"
  if ! has_java || { ! [ -d "$dir/libs" ] && ! command -v mvn >/dev/null; }; then
    if ! ensure_java_and_maven; then
      say "Kafka needs Java $JAVA_MIN or newer and Maven: apt-get install openjdk-17-jre-headless maven; $without"
      return 0
    fi
  fi
  cp deploy/kafka/log4j2.properties "$dir/"
  if [ -d "$dir/libs" ] && cmp -s deploy/kafka/pom.xml "$dir/pom.xml"; then return 0; fi
  copy_jars "$dir" || say "Maven could not fetch Kafka's jars: see $dir/maven.log and run make again; $without"
}

case "${1-} $#" in
  "venv 3") make_venv "$2" "$3" ;;
  "kafka 2") fetch_kafka "$2" ;;
  *) sed -n '2,4s/^# //p' "$0" >&2 && exit 2 ;;
esac
