/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The verdict: one function that every hook calls. Its meaning is defined by rama_ebpf/policy/matcher.py, and a
 * differential test holds the two against each other.
 *
 * Order: failsafe, bans, rules, SYN limits, default. Rules come from two layers, the set that was best and the runtime layer on
 * top of it; of all that apply, the one of the highest rank decides (see enum rank). A rule that has expired, or is a
 * dry run, leaves it to the next.
 */
#ifndef RAMA_EBPF_VERDICT_H
#define RAMA_EBPF_VERDICT_H

static __always_inline int is_failsafe(const struct gate *g, const struct packet *p)
{
	struct failsafe_key key = { .plen = 32 + 128, .ipv4 = p->ipv4, .addr = p->source };
	u32 *lists;

#pragma unroll
	for (int i = 0; i < MAX_FAILSAFE_PORTS; i++)
		if (g->failsafe_ports[i] == p->port)
			return 1;
	lists = failsafe.lookup(&key);
	return lists && *lists & FAILSAFE_COVERED << (g->failsafe_list & 1);
}

static __always_inline void limit(struct verdict *v, u64 emission, u64 tolerance, u32 bucket, struct scratch *s,
				  int charge)
{
	if (!emission || charge == CHARGE_NONE)
		return;
	if (exceeds(emission, tolerance, bucket, &s->packet, charge)) {
		v->action = ACTION_DROP;
		v->stage = STAGE_LIMIT;
	} else if (charge == CHARGE_PEEK) {
		struct due *due = &s->due[bucket == BUCKET_GLOBAL];

		due->emission = emission;
		due->bucket = bucket;
	}
}

/* Charge a SYN to the limits that a PEEK found room in. */
static __always_inline void settle(const struct scratch *s)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < 2; i++)
		if (s->due[i].emission)
			exceeds(s->due[i].emission, 0, s->due[i].bucket, &s->packet, CHARGE_SETTLE);
}

/* A place for a packet, all zero. */
static __always_inline struct scratch *begin_in(u32 index)
{
	struct scratch *s = scratch.lookup(&index);

	if (s)
		__builtin_memset(&s->packet, 0, sizeof(s->packet));
	return s;
}

static __always_inline struct scratch *begin(void)
{
	return begin_in(SCRATCH_HOOKS);
}

static __always_inline struct verdict judge(struct scratch *s, int charge)
{
	struct verdict v = { .action = ACTION_ALLOW, .stage = STAGE_DEFAULT };
	const struct set_head *head;
	u32 zero = 0, set, rank;
	struct finding *f;
	u64 half, deadline;
	void *pages;
	const struct packet *p = &s->packet;
	struct gate *g = gate.lookup(&zero);

	if (!g)
		return v; /* cannot be: an array has all its elements */
	if (g->flags & GATE_FAILSAFE && is_failsafe(g, p)) {
		v.stage = STAGE_FAILSAFE;
		return v;
	}
	if (g->flags & GATE_BANS) {
		u32 action = find_ban(s, g);

		if (action) {
			v.stage = STAGE_BAN;
			v.action = action;
			return v;
		}
	}

	__builtin_memset(&s->loaded, 0, sizeof(s->loaded));
	__builtin_memset(&s->runtime, 0, sizeof(s->runtime));
	if (charge == CHARGE_PEEK)
		__builtin_memset(&s->due, 0, sizeof(s->due));
	s->high = bpf_ntohll(p->source.half[0]);
	s->low = bpf_ntohll(p->source.half[1]);
	/* The deadline first: who undoes a change moves `active` before taking the deadline away. */
	deadline = *(volatile u64 *)&g->deadline;
	set = (deadline && bpf_ktime_get_boot_ns() >= deadline ? g->fallback : *(volatile u32 *)&g->active) & 1;
	pages = sets.lookup(&set);
	asm volatile("" : "+r"(s)); /* a tenth less for the verifier to walk */
	/* It was in memory for the call, and of that the verifier may know nothing any more. */
	asm volatile("" : "+r"(set));
	set &= 1;
	head = &g->sets[set];
	if (pages)
		search_set(s, g, set, pages);
	search_runtime(s, g, p);

	barrier();
	rank = s->loaded.rank > s->runtime.rank ? s->loaded.rank : s->runtime.rank;
	f = s->loaded.dry_rank > s->runtime.dry_rank ? &s->loaded : &s->runtime;
	if (f->dry_rank && f->dry_rank >= rank) {
		v.dry_rule = f->dry_rule;
		v.dry_action = f->dry_action;
	}
	if (rank) {
		f = s->loaded.rank == rank ? &s->loaded : &s->runtime; /* never both: see ORDER_RUNTIME */
		v.stage = STAGE_RULE;
		v.rule = f->rule;
		v.action = f->action;
		if (v.action == ACTION_LIMIT) {
			struct rule *r = rules.lookup(&f->rule);

			v.action = ACTION_ALLOW;
			if (r)
				limit(&v, r->emission, r->tolerance, v.rule, s, charge);
		}
		return v;
	}
	v.action = head->default_action;
	if (v.action == ACTION_ALLOW)
		limit(&v, head->per_source.emission, head->per_source.tolerance, BUCKET_SOURCE, s, charge);
	if (v.action == ACTION_ALLOW)
		limit(&v, head->global.emission, head->global.tolerance, BUCKET_GLOBAL, s, charge);
	return v;
}

/* Judge the connection attempt in s->packet, on one of our listeners. */
static __always_inline struct verdict verdict(struct scratch *s, int charge)
{
	s->verdict = judge(s, charge);
	/* Read back, it is unknown to the verifier, which else walks all that follows anew for each way it was found. */
	barrier();
	return s->verdict;
}

#endif
