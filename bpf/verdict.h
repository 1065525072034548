/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * The verdict: one function that every hook calls. Its meaning is defined by rama_ebpf/policy/matcher.py, and a
 * differential test holds the two against each other.
 *
 * Order: failsafe, bans, rules, SYN limits, default. Among rules the longest prefix wins; at the same prefix a rule
 * for the listener's port beats one for any port, and then deny beats limit beats allow (userspace sorts the
 * candidates of a prefix). A rule that has expired or is a dry run lets the next candidate, then the next shorter
 * prefix, decide.
 */
#ifndef RAMA_EBPF_VERDICT_H
#define RAMA_EBPF_VERDICT_H

struct verdict {
	u32 action;
	u32 stage;
	u32 rule;
	u32 dry_action; /* what dry-run rules would have decided, ACTION_NONE if they agree or there is none */
	u32 dry_rule;
};

/* Generic cell rate algorithm (ITU-T I.371): one theoretical arrival time per bucket. Two CPUs may race on one bucket
 * and admit a few SYNs too many; a lock would cost every packet. */
static __always_inline int exceeds(const struct limit *limit, u32 rule, const struct packet *p)
{
	struct bucket_key key = { .rule = rule };
	u64 *stored, arrival, next, now = bpf_ktime_get_boot_ns();

	if (rule != BUCKET_GLOBAL)
		__builtin_memcpy(key.source, p->ipv4 ? p->source.b + 8 : p->source.b, 8);
	stored = buckets.lookup(&key);
	arrival = stored && *stored > now ? *stored : now;
	if (arrival - now > limit->tolerance)
		return 1;
	next = arrival + limit->emission;
	if (stored)
		*stored = next;
	else
		buckets.update(&key, &next);
	return 0;
}

static __always_inline void count_rule(u32 id, int dry)
{
	struct rule_hits *hits = rule_hits.lookup(&id);

	if (!hits)
		return;
	if (dry)
		hits->dry++;
	else
		hits->decided++;
}

/* Let the candidates of one entry decide; 1 if one did. */
static __always_inline int consider(const struct entry *e, struct verdict *v, struct limit *limit, u64 now)
{
#pragma unroll
	for (int i = 0; i < MAX_CANDIDATES; i++) {
		u32 id = e->rule[i];
		struct rule *r;

		if (!id)
			return 0;
		r = rules.lookup(&id);
		if (!r || r->action == ACTION_NONE || (r->expires && now >= r->expires))
			continue;
		if (r->flags & RULE_DRY_RUN) {
			if (!v->dry_rule) {
				v->dry_rule = id;
				v->dry_action = r->action;
			}
			continue;
		}
		v->stage = STAGE_RULE;
		v->action = r->action;
		v->rule = id;
		limit->emission = r->emission;
		limit->tolerance = r->tolerance;
		return 1;
	}
	return 0;
}

/* One family's maps of the set in force, and the keys to look a source up in them. */
struct source_tables {
	void *exact, *prefixes; /* NULL where there is nothing to find */
	u32 bits;
	struct exact_key exact_key;
	struct prefix_key prefix_key;
};

/* Copy what is found into *e and return its length, or -1. Entries are copied because the walk then compares lengths,
 * not pointers that may be null. */
static __always_inline int take(const struct entry *found, struct entry *e)
{
	if (!found)
		return -1;
	*e = *found;
	return found->plen;
}

static __always_inline int fetch_prefix(struct source_tables *t, u16 scope, int plen, struct entry *e)
{
	if (plen < 0 || !t->prefixes)
		return -1;
	t->prefix_key.scope = scope;
	t->prefix_key.plen = SCOPE_BITS + plen;
	return take(bpf_map_lookup_elem(t->prefixes, &t->prefix_key), e);
}

/* The longest match of all: the exact address if it is there (prefixes of full length are kept in no trie). */
static __always_inline int fetch_first(struct source_tables *t, u16 scope, struct entry *e)
{
	if (t->exact) {
		struct entry *found;

		t->exact_key.scope = scope;
		found = bpf_map_lookup_elem(t->exact, &t->exact_key);
		if (found)
			return take(found, e);
	}
	return fetch_prefix(t, scope, t->bits - 1, e);
}

/*
 * Walk the prefixes that cover the source from the longest to the shortest, those of the port's scope and those of
 * any port merged by length, until a rule decides. An LPM look-up for one bit less than the last match finds the next
 * shorter one, so entries that are expired or dry need no clean-up for the answer to be exact.
 */
static __always_inline int match(struct source_tables *t, u16 scope, struct verdict *v, struct limit *limit, u64 now)
{
	struct entry own = {}, any = {};
	int own_length = -1, any_length;

	any_length = fetch_first(t, SCOPE_ANY, &any);
	if (scope)
		own_length = fetch_first(t, scope, &own);
	for (int i = 0; i < MAX_STEPS; i++) {
		int use_own = own_length >= any_length;
		int length = use_own ? own_length : any_length;
		struct entry e = use_own ? own : any;

		if (length < 0)
			return 0;
		if (consider(&e, v, limit, now))
			return 1;
		length = fetch_prefix(t, use_own ? scope : SCOPE_ANY, length - 1, &e);
		if (use_own) {
			own = e;
			own_length = length;
		} else {
			any = e;
			any_length = length;
		}
	}
	return 0;
}

static __always_inline void open_tables(struct source_tables *t, u32 set, u32 flags, const struct packet *p)
{
	if (p->ipv4) {
		t->bits = 32;
		t->exact = flags & SET_EXACT4 ? exact4.lookup(&set) : NULL;
		t->prefixes = flags & SET_PREFIX4 ? prefix4.lookup(&set) : NULL;
		__builtin_memcpy(t->exact_key.addr, p->source.b + 12, 4);
		__builtin_memcpy(t->prefix_key.addr, p->source.b + 12, 4);
	} else {
		t->bits = 128;
		t->exact = flags & SET_EXACT6 ? exact6.lookup(&set) : NULL;
		t->prefixes = flags & SET_PREFIX6 ? prefix6.lookup(&set) : NULL;
		__builtin_memcpy(t->exact_key.addr, p->source.b, 16);
		__builtin_memcpy(t->prefix_key.addr, p->source.b, 16);
	}
}

static __always_inline struct listener *find_listener(const struct packet *p)
{
	struct listener_key key = { .addr = p->target, .port = p->port };
	struct listener *listener = listeners.lookup(&key);

	if (listener)
		return listener;
	/* The wildcard of the target's family: 0.0.0.0 (mapped) and :: on one port are two listeners. */
	if (is_mapped(&p->target))
		map_ipv4(&key.addr, 0);
	else
		__builtin_memset(&key.addr, 0, sizeof(key.addr));
	return listeners.lookup(&key);
}

/*
 * Judge a connection attempt on one of our listeners. `admit` is set where the answer takes effect: there limits are
 * charged; elsewhere a limit counts as within its rate.
 */
static __always_inline struct verdict verdict(const struct packet *p, const struct listener *listener, int admit)
{
	struct verdict v = { .action = ACTION_ALLOW, .stage = STAGE_DEFAULT };
	struct limit limit = {};
	u32 zero = 0, set;
	u64 now;
	struct gate *g = gate.lookup(&zero);

	if (!g)
		return v;
	now = g->flags & GATE_TIMED ? bpf_ktime_get_boot_ns() : 0; /* the clock costs more than a look-up */
	set = *(volatile u32 *)&g->active & 1;

	if (listener->failsafe) {
		v.stage = STAGE_FAILSAFE;
		return v;
	}
	if (g->flags & GATE_FAILSAFE) {
		struct failsafe_key key = { .plen = 128, .addr = p->source };

		if (failsafe.lookup(&key)) {
			v.stage = STAGE_FAILSAFE;
			return v;
		}
	}
	if (g->flags & GATE_BANS) {
		struct address source = p->source;
		struct ban *ban = bans.lookup(&source);

		if (ban && (!ban->expires || now < ban->expires)) {
			if (admit || ban->action == ACTION_REJECT)
				__sync_fetch_and_add(&ban->hits, 1);
			v.stage = STAGE_BAN;
			v.action = ban->action;
			return v;
		}
	}

	{
		const struct set_head *head = &g->sets[set];
		struct source_tables tables = {};

		open_tables(&tables, set, head->flags, p);
		if (match(&tables, listener->scoped ? p->port : SCOPE_ANY, &v, &limit, now)) {
			if (v.action == ACTION_LIMIT) {
				v.action = ACTION_ALLOW;
				if (admit && exceeds(&limit, v.rule, p)) {
					v.action = ACTION_DROP;
					v.stage = STAGE_LIMIT;
				}
			}
			return v;
		}
		v.action = head->default_action;
		if (v.action == ACTION_ALLOW && admit) {
			limit = head->per_source;
			if (limit.emission && exceeds(&limit, BUCKET_SOURCE, p)) {
				v.action = ACTION_DROP;
				v.stage = STAGE_LIMIT;
				return v;
			}
			limit = head->global;
			if (limit.emission && exceeds(&limit, BUCKET_GLOBAL, p)) {
				v.action = ACTION_DROP;
				v.stage = STAGE_LIMIT;
			}
		}
	}
	return v;
}

/* Count a verdict where it takes effect, so that one SYN is counted once whatever hooks it passed. */
static __always_inline void count(const struct verdict *v, u32 hook)
{
	u32 index = (hook * STAGE_COUNT + v->stage) * ACTION_COUNT + v->action;
	u64 *total = gate_stats.lookup(&index);

	if (total)
		(*total)++;
	if (v->stage == STAGE_RULE || v->stage == STAGE_LIMIT || v->stage == STAGE_DEFAULT)
		count_rule(v->rule, 0); /* rule 0 is the default */
	if (v->dry_rule)
		count_rule(v->dry_rule, 1);
}

#endif
