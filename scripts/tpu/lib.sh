# What tpu.sh and xpk.sh share: errors, options, and commands that are printed
# before they run. Sourced by them; needs bash 4.4 or later.

set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is too old; install bash 4.4 or later" >&2
  exit 2
fi
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)  # the working tree
exec 3>&1  # what a dry run prints, from inside of $(…), too

# A mistake of the user's: what is wrong, and the mend.
fail() {
  echo "error: $*" >&2
  exit 2
}

# ---- quoting and running

# Words as any POSIX shell reads them; Python's shlex reads them alike.
quote() {
  local word separator='' apostrophe="'\\''"
  for word in "$@"; do
    if [[ -z $word || $word == *[!a-zA-Z0-9_@%+=:,./-]* ]]; then
      word="'"${word//\'/"$apostrophe"}"'"
    fi
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# The same on one line, whatever is in the words; bash alone reads it. Two
# layers between here and there would otherwise change it: YAML ends a block
# at a line that is not indented, and Kubernetes expands $(NAME).
quote_on_one_line() {
  local text
  text=$(printf '%q ' "$@")
  text=${text//'$('/'\x24('}
  printf '%s' "${text% }"
}

# A dry run's output is a script that does what the real run does.
announce() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quote "$@")" >&3
  else
    printf '+ %s\n' "$(quote "$@")" >&2
  fi
}

# What is told between commands; in a dry run a comment of that script.
note() {
  if [[ $dry_run ]]; then echo "# $*" >&3; else echo "# $*" >&2; fi
}

execute() {
  announce "$@"
  [[ $dry_run ]] || "$@" 3>&-
}

need_program() {  # PROGRAM MEND
  [[ $dry_run ]] || command -v "$1" >/dev/null ||
    fail "$1: no such program; $2"
}

# ---- options

# Every command takes every option and uses those that it needs, so one line of
# options serves from creation to deletion. `--num-slices=2` sets num_slices;
# what an option is without being given comes from TPU_NUM_SLICES.
#   parse_options 'VALUES' 'SWITCHES' 'LISTS' ARGUMENT…
# Words after `--` become the array `words`.
parse_options() {
  local values=" ${1//$'\n'/ } " switches=" $2 " lists=" $3 "
  local argument option variable
  shift 3
  local name_of
  for option in $values; do
    name_of=${option^^}
    name_of=TPU_${name_of//-/_}
    printf -v "${option//-/_}" '%s' "${!name_of-}"
  done
  for option in $switches; do printf -v "${option//-/_}" ''; done
  for option in $lists; do declare -ga "${option//-/_}=()"; done
  words=()
  while (($#)); do
    argument=$1
    shift
    case $argument in
      --) words=("$@") && return ;;
      --help) print_help && exit ;;
    esac
    option=${argument%%=*}
    option=${option#--}
    variable=${option//-/_}
    if [[ $argument != --* ]]; then
      fail "$argument: stray word; options are --NAME=VALUE, and what runs" \
        'there stands after --'
    elif [[ $switches == *" $option "* ]]; then
      [[ $argument != *=* ]] || fail "$argument: takes no value"
      printf -v "$variable" yes
    elif [[ $values == *" $option "* && $argument == *=?* ]]; then
      printf -v "$variable" '%s' "${argument#*=}"
    elif [[ $lists == *" $option "* && $argument == *=?* ]]; then
      local -n list=$variable
      list+=("${argument#*=}")
      unset -n list
    elif [[ "$values$lists" == *" $option "* ]]; then
      fail "--$option: needs a value; give --$option=VALUE"
    else
      fail "$argument: unknown option; see bash scripts/tpu/$program --help"
    fi
  done
}

# Prints the comment at the head of the script that was called.
print_help() {
  sed -n '2,/^[^#]/{/^#/!d; s/^# \{0,1\}//; p;}' "$0"
}

need() {  # OPTION PATTERN EXAMPLE
  local variable=${1//-/_}
  local upper=${variable^^} value=${!variable}
  [[ $value ]] ||
    fail "--$1: is missing; give --$1=$3, or export TPU_$upper=$3"
  [[ $value =~ ^$2$ ]] || fail "--$1=$value: is no valid $1; give one like $3"
}

need_place() {
  need project '[a-z][-a-z0-9.:]{4,61}[a-z0-9]' my-project
  need zone '[a-z]+-[a-z]+[0-9]+-[a-z]' us-east5-b
}

# Of --env, as of a shell.
need_environment() {
  local pair
  for pair in "${env[@]}"; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
      fail "--env=$pair: is no NAME=VALUE"
  done
}

need_number() {  # OPTION DEFAULT LEAST
  local variable=${1//-/_}
  [[ ${!variable} ]] || printf -v "$variable" '%s' "$2"
  [[ ${!variable} =~ ^[0-9]{1,9}$ ]] && ((10#${!variable} >= $3)) ||
    fail "--$1=${!variable}: must be a whole number of at least $3"
  printf -v "$variable" '%d' "$((10#${!variable}))"  # 08 is no octal
}

need_words() {
  ((${#words[@]})) ||
    fail "$command: what shall run? give it after --, such as:" \
      '-- tpu_lm train --config=FILE --workdir=DIR --coordinator=auto'
}

need_one_tier() {
  local given="${spot:+--spot }${reserved:+--reserved }"
  given+="${reservation:+--reservation }"
  given=${given% }
  [[ $given != *' '* ]] || fail "${given// / and }: choose one"
}

# `v5e-256` and `2xv5e-256` as `tpu_lm plan --topology` has them, and Google's
# own `v5litepod-256`. Sets accelerator, num_slices and default_runtime.
need_accelerator() {
  need accelerator '[a-z0-9-]+' v5e-256
  local kind size asked=$accelerator
  if [[ $accelerator =~ ^([0-9]+)x(v.+)$ ]]; then
    [[ -z $num_slices || $num_slices == "${BASH_REMATCH[1]}" ]] ||
      fail "--accelerator=$asked: is not --num-slices=$num_slices; drop one"
    num_slices=${BASH_REMATCH[1]}
    accelerator=${BASH_REMATCH[2]}
  fi
  need_number num-slices 1 1
  accelerator=${accelerator/#v5e-/v5litepod-}
  kind=${accelerator%-*}
  size=${accelerator##*-}
  [[ $size =~ ^[1-9][0-9]{0,4}$ ]] || size=0
  case $kind in
    # v4-N and v5p-N count TensorCores, two to a chip; the others count chips.
    v4) default_runtime=tpu-ubuntu2204-base ;;
    v5p) default_runtime=v2-alpha-tpuv5 ;;
    v5litepod) default_runtime=v2-alpha-tpuv5-lite ;;
    v6e) default_runtime=v2-alpha-tpuv6e ;;
    *) size=0 ;;
  esac
  case $kind:$size in
    v4:* | v5p:*) ((size && size % 8 == 0)) && return ;;
    *:[148] | *:16 | *:32 | *:64 | *:128 | *:256) return ;;
  esac
  fail "--accelerator=$asked: no such slice; known are v5e-N and v6e-N with" \
    'N chips (1, 4, 8, 16 … 256), v4-N and v5p-N with N cores (8, 16 …),' \
    'and 2xv5e-256 for two slices'
}

# ---- the code

# What of the working tree goes there: no .git, no data, no environment.
parts=(setup.py pyproject.toml README.md LICENSE requirements scripts configs
  tpu_lm)

pack() {  # ARCHIVE
  local part
  for part in "${include[@]}"; do
    [[ -e $tree/$part && $part != /* ]] ||
      fail "--include=$part: is not in $tree; give a path relative to it"
  done
  execute mkdir -p "$(dirname "$1")"
  execute tar -czf "$1" -C "$tree" --exclude=__pycache__ "${parts[@]}" \
    "${include[@]}"
}
