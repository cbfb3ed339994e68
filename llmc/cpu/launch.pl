#!/usr/bin/perl
# Rewrites preprocessed CUDA C++ (the output of g++ -E) into C++ for cuda_cpu.h. Nothing moves to another
# line, so errors and debuggers name the lines of the source.
#
#   K<<<CONFIG>>>(ARGS)          ->  launch(Config(CONFIG), "K", GIVE_KERNEL, CALL)(ARGS)  [launch.h]
#   extern __shared__ T name[];  ->  T* name = (T*)dynamic_shared();
#   __shared__ T name[N];        ->  static constinit thread_local T name[N]; poison_once(name, [] {});
#   #pragma unroll N             ->  #pragma GCC unroll N; without a number it goes, and g++ unrolls as it sees fit:
#                                    a GPU needs it to keep arrays in registers, here it would only grow the code
#
# K is an identifier, with any qualifiers and template arguments, or an expression in parentheses. A ">" inside
# template arguments must be in parentheses, as in C++. Where the call deduces template arguments of K, NULL and
# {} cannot be arguments. A __shared__ variable must be local to a function.
use strict;
use warnings;

local $/;
my $text = <STDIN>;
my $shared = $text =~ s/^#pragma cuda_cpu_shared (.*)$//m ? $1 : 'static thread_local';    # cuda_cpu.h

# Literals, in which nothing is rewritten. The quote of 1'000'000 begins none.
my $literal = qr/
    R"([^\s("\\]*)\(.*?\)\g{-1}"
  | "(?:[^"\\\n]|\\.)*+"
  | (?<![0-9A-Za-z_])(?:u8|[uUL])?'(?:[^'\\\n]|\\.)++'
/xs;

sub fail {
    my ($position, $problem) = @_;
    my ($line, $file) = (0, 'standard input');
    for (split /\n/, substr($text, 0, $position) . '.') {
        $line++;
        ($line, $file) = ($1 - 1, $2) if /^# (\d+) "(.*?)"/;
    }
    die "$file:$line: launch.pl: $problem\n";
}

# Where the kernel's name begins that ends before $p, or -1. Scans backwards over KERNEL, ns::KERNEL,
# KERNEL<...>, OBJECT::template KERNEL<...> or (...).
sub kernel_start {
    my ($p) = @_;
    my $ends_with = sub { my $n = length $_[0]; $p >= $n && substr($text, $p - $n, $n) eq $_[0] };
    my $skip_space = sub { $p-- while $p > 0 && substr($text, $p - 1, 1) =~ /\s/ };
    my $skip_parentheses = sub {
        my $depth = 0;
        while ($p > 0) {
            my $c = substr($text, --$p, 1);
            $depth += ($c eq ')') - ($c eq '(');
            return 1 if !$depth;
        }
        return 0;
    };
    my $skip_angles = sub {
        my $depth = 0;
        while ($p > 0) {
            if ($ends_with->(')')) {
                $skip_parentheses->() or return 0;
                next;
            }
            my $c = substr($text, --$p, 1);
            $depth += ($c eq '>') - ($c eq '<');
            return 1 if !$depth;
        }
        return 0;
    };

    $skip_space->();
    if ($ends_with->(')')) {
        return $skip_parentheses->() ? $p : -1;
    }
    while (1) {
        if ($ends_with->('>')) {
            $skip_angles->() or return -1;
            $skip_space->();
        }
        my $end = $p;
        $p-- while $p > 0 && substr($text, $p - 1, 1) =~ /\w/;
        return -1 if $p == $end;
        my $start = $p;
        $skip_space->();
        if ($ends_with->('template')) {
            $p -= length 'template';
            $skip_space->();
        }
        return $start if !$ends_with->('::');
        $p -= 2;
        $start = $p;
        $skip_space->();
        return $start if !($p > 0 && substr($text, $p - 1, 1) =~ /[\w>]/);    # ::KERNEL
    }
}

# Where the configuration that begins at $p ends: past the >>> that is outside any bracket. 0 if there is none.
sub config_end {
    my ($p) = @_;
    my $depth = 0;
    pos($text) = $p;
    while ($text =~ /\G[^()\[\]{}"'>;]*+(?:$literal|(>>>)|(.))/gs) {
        my ($close, $c) = ($2, $3);    # $1 is the delimiter of a raw string
        if (defined $close) {
            return pos($text) if !$depth;
            pos($text) -= 2;           # perhaps the >> of a nested template, then another >
            next;
        }
        next if !defined $c;
        $depth++ if $c =~ /[(\[{]/;
        $depth-- if $c =~ /[)\]}]/;
        return 0 if $depth < 0 || $c eq ';' && !$depth;
    }
    return 0;
}

# The declaration of a static __shared__ variable, or of several: "T a[2], b" and what poisons each.
sub shared_declaration {
    my ($declaration) = @_;
    my $out = "$shared$declaration;";
    my $depth = 0;
    my @declarators = ('');
    for my $c (split //, $declaration) {
        $depth++ if $c =~ /[(\[{<]/;
        $depth-- if $c =~ /[)\]}>]/;
        if ($c eq ',' && !$depth) { push @declarators, '' }
        else                      { $declarators[-1] .= $c }
    }
    for (@declarators) {
        $out .= " ::cuda_cpu::poison_once($1, [] {});" if /(\w+)\s*(?:\[[^\[\]]*\]\s*)*$/;
    }
    return $out;
}

# Most of the text is headers of the compiler and of libraries. Only files with something to rewrite are read token by
# token, each from its line marker on.
my @parts;    # where they begin and end
my $at = 0;
for my $part (split /^(?=# \d+ ")/m, $text) {
    push @parts, [$at, $at + length $part] if $part =~ /<<<|__shared__|#pragma unroll/;
    $at += length $part;
}

my $out  = '';
my $done = 0;    # what precedes this position is in $out
for my $part (@parts) {
    my ($begin, $stop) = @$part;
    pos($text) = $begin < $done ? $done : $begin;
    while (pos($text) < $stop && $text =~ /\G[^"'<_e#RuUL]*+(?:$literal|(<<<)|\b(extern\s+__shared__|(?:static\s+)?__shared__)\b|(\#pragma\ unroll\b[^\n]*)|.)/gs) {
        if (defined $2) {
            my $op    = $-[2];
            my $start = kernel_start($op);
            my $end   = config_end($op + 3);
            fail($op, 'cannot read this launch') if $start < $done || !$end;
            my $kernel = substr($text, $start, $op - $start);
            my $config = substr($text, $op + 3, $end - $op - 6);
            (my $name = $kernel) =~ s/(["\\])/\\$1/g;
            $name =~ s/\s+/ /g;
            $out .= substr($text, $done, $start - $done)
                . "::cuda_cpu::launch(::cuda_cpu::Config($config), \"$name\", "
                . "[&](auto cuda_cpu_f) -> decltype(cuda_cpu_f($kernel)) { return cuda_cpu_f($kernel); }, "
                . "[=](auto... cuda_cpu_a) { $kernel(cuda_cpu_a...); })";
            $done = $end;
            pos($text) = $end;
        } elsif (defined $3) {
            my ($from, $keyword) = ($-[3], $3);
            $text =~ /\G([^;]*);/gs or fail($from, 'this __shared__ declaration has no end');
            my ($declaration, $to) = ($1, pos($text));
            $out .= substr($text, $done, $from - $done);
            if ($keyword !~ /^extern/) {
                $out .= shared_declaration($declaration);
            } elsif ($declaration =~ /^(.*?)(\w+)\s*\[\s*\]\s*$/s) {
                my ($type, $name) = ($1, $2);
                $type =~ s/\b(?:alignas|__attribute__)\s*(\((?:[^()]++|(?1))*\))//g;    # it is aligned to 128 bytes
                $out .= "$type* $name = ($type*)::cuda_cpu::dynamic_shared();";
            } else {
                fail($from, 'cannot read this extern __shared__ declaration');
            }
            $done = $to;
        } elsif (defined $4) {
            my ($at, $pragma) = ($-[4], $4);    # the next match overwrites both
            my $unroll = $pragma =~ /(\d+)\)?\s*$/ ? "#pragma GCC unroll $1" : '';
            $out .= substr($text, $done, $at - $done) . $unroll;
            $done = pos($text);
        }
    }
}
print $out . substr($text, $done);
