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

/* What a hook does about limits: only where a SYN is admitted for good is it charged, once whatever hooks it passed. */
enum charge { CHARGE_NONE = 0, CHARGE_PEEK = 1, CHARGE_ADMIT = 2 };

struct verdict {
	u32 action;
	u32 stage;
	u32 rule;
	u32 dry_action; /* what the highest dry-run rule above the decision would have decided */
	u32 dry_rule;
};

/* Generic cell rate algorithm (ITU-T I.371): one theoretical arrival time per bucket. Two CPUs may race on one bucket
 * and admit a few SYNs too many; a lock would cost every packet. */
static __always_inline int exceeds(u64 emission, u64 tolerance, u32 rule, const struct packet *p, int charge)
{
	struct bucket_key key = { .rule = rule };
	u64 *stored, arrival, next, now = bpf_ktime_get_boot_ns();

	if (rule != BUCKET_GLOBAL)
		__builtin_memcpy(key.source, p->ipv4 ? p->source.b + 8 : p->source.b, 8);
	stored = buckets.lookup(&key);
	arrival = stored && *stored > now ? *stored : now;
	if (arrival - now > tolerance)
		return 1;
	if (charge != CHARGE_ADMIT)
		return 0;
	next = arrival + emission;
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

/* The clock costs as much as a look-up: it is read only for what can expire. */
static __always_inline int expired(u64 expires)
{
	return expires && bpf_ktime_get_boot_ns() >= expires;
}

#define barrier() asm volatile("" ::: "memory")

/* Let a rule that applies by its prefix take part; each layer asks its rules from the highest rank to the lowest.
 * Returns 1 if this one decides. */
static __always_inline int consider(struct finding *f, u32 id, u32 length, const struct packet *p)
{
	struct rule *r = rules.lookup(&id);
	u32 rank;

	if (!r || r->action == ACTION_NONE || (r->port && r->port != p->port) || expired(r->expires))
		return 0;
	rank = (length + 1) << RANK_LENGTH_SHIFT | r->order;
	if (r->flags & RULE_DRY_RUN) {
		if (!f->dry_rank) {
			f->dry_rank = rank;
			f->dry_rule = id;
			f->dry_action = r->action;
		}
		return 0;
	}
	f->rank = rank;
	f->rule = id;
	f->action = r->action;
	return 1;
}

/* The value of the interval of a set's table that holds an address. */
static __always_inline u32 find_interval(void *set, const struct table *t, int ipv4, u64 high, u64 low)
{
	u64 slot = high >> (t->shift & 63);
	struct pair *cell;
	u32 at, count;

	if (slot < t->base)
		return t->below;
	slot -= t->base;
	if (slot >= t->slots)
		return t->above;
	at = t->slots_at + slot;
	cell = bpf_map_lookup_elem(set, &at);
	if (!cell)
		return 0;
	count = cell->b;
	if (!count)
		return cell->a;
	/* The last interval that begins at or before the address; the first one does. */
	at = cell->a;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_BISECTION && count > 1; i++) {
		u32 half = count / 2, middle, index = at + half;
		u64 *bound;

		middle = t->bounds_at + (ipv4 ? index : 3 * index);
		bound = bpf_map_lookup_elem(set, &middle);
		if (!bound)
			return 0;
		if (ipv4) {
			if ((u32)*bound <= high)
				at = index;
		} else if (*bound < high) {
			at = index;
		} else if (*bound == high) {
			middle++;
			bound = bpf_map_lookup_elem(set, &middle);
			if (!bound)
				return 0;
			if (*bound <= low)
				at = index;
		}
		count -= half;
	}
	at = t->bounds_at + (ipv4 ? at : 3 * at + 2);
	cell = bpf_map_lookup_elem(set, &at);
	if (!cell)
		return 0;
	return ipv4 ? cell->b : cell->a;
}

static __always_inline void search_set(struct scratch *s, void *set, const struct set_head *head,
				       const struct packet *p)
{
	u32 chain = p->ipv4 ? find_interval(set, &head->tables[0], 1, s->low & 0xffffffff, 0)
			    : find_interval(set, &head->tables[1], 0, s->high, s->low);

	if (!chain)
		return;
	chain += head->chains_at;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_CHAIN; i++) {
		u32 at = chain + i;
		struct pair *item = bpf_map_lookup_elem(set, &at);

		if (!item || consider(&s->loaded, item->a, item->b & CHAIN_LENGTH, p) || item->b & CHAIN_END)
			return;
	}
}

/* Of a word that is not 0. Without a branch: each would double what the verifier has to walk through. */
static __always_inline u32 highest_bit(u64 word)
{
	word |= word >> 1;
	word |= word >> 2;
	word |= word >> 4;
	word |= word >> 8;
	word |= word >> 16;
	word |= word >> 32;
	/* All bits up to the highest are set now: count them. */
	word -= word >> 1 & 0x5555555555555555ull;
	word = (word & 0x3333333333333333ull) + (word >> 2 & 0x3333333333333333ull);
	word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0full;
	return (word * 0x0101010101010101ull >> 56) - 1;
}

/*
 * The runtime layer, from the longest prefix to the shortest, until one decides or no shorter one could outrank what
 * the set says. A prefix's rule for the port comes before its rule for any.
 */
static __always_inline void search_runtime(struct scratch *s, const struct gate *g, const struct packet *p)
{
	const struct lengths *present = &g->runtime[!p->ipv4];

	s->base = 128;
	s->word = present->bits[2];
	s->next = present->bits[1];
	s->last = present->bits[0];
	s->key.port = 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_RUNTIME_LENGTHS + 2; i++) {
		u64 mask, upper;
		u32 length, *id;

		barrier();
		if (!s->word) {
			if (!s->base)
				return;
			s->base -= 64;
			s->word = s->next;
			s->next = s->last;
			continue;
		}
		length = highest_bit(s->word) & 63;
		s->word &= ~(1ull << length);
		length += s->base;
		if (length + 1 < s->loaded.rank >> RANK_LENGTH_SHIFT)
			return;
		/* The address's first `length` bits. */
		mask = ~(~0ull >> (length & 63));
		upper = -(u64)((length / 64 + 1) >> 1); /* all ones from 64 on */
		s->key.prefix.half[0] = bpf_htonll(s->high & (mask | upper));
		s->key.prefix.half[1] = bpf_htonll(s->low & upper & (mask | -(u64)(length / 128)));
		s->key.length = length;
		if (g->flags & GATE_RUNTIME_PORTS) {
			s->key.port = p->port;
			id = runtime.lookup(&s->key);
			if (id && consider(&s->runtime, *id, s->key.length, p))
				return;
			s->key.port = 0;
		}
		id = runtime.lookup(&s->key);
		if (id && consider(&s->runtime, *id, s->key.length, p))
			return;
	}
}

static __always_inline struct listener *find_listener(const struct packet *p, u32 *wildcard)
{
	struct listener_key key = { .addr = p->target, .port = p->port };
	struct listener *listener = listeners.lookup(&key);

	*wildcard = !listener;
	if (listener)
		return listener;
	/* The wildcard of the target's family: 0.0.0.0 (mapped) and :: on one port are two listeners. */
	if (is_mapped(&p->target))
		map_ipv4(&key.addr, 0);
	else
		__builtin_memset(&key.addr, 0, sizeof(key.addr));
	return listeners.lookup(&key);
}

static __always_inline int is_failsafe(const struct gate *g, const struct packet *p)
{
	struct failsafe_key key = { .plen = 32 + 128, .ipv4 = p->ipv4, .addr = p->source };

#pragma unroll
	for (int i = 0; i < MAX_FAILSAFE_PORTS; i++)
		if (g->failsafe_ports[i] == p->port)
			return 1;
	return failsafe.lookup(&key) != NULL;
}

static __always_inline void limit(struct verdict *v, u64 emission, u64 tolerance, u32 bucket, const struct packet *p,
				  int charge)
{
	if (!emission || charge == CHARGE_NONE || !exceeds(emission, tolerance, bucket, p, charge))
		return;
	v->action = ACTION_DROP;
	v->stage = STAGE_LIMIT;
}

/* A place for a packet, all zero. */
static __always_inline struct scratch *begin(void)
{
	u32 zero = 0;
	struct scratch *s = scratch.lookup(&zero);

	if (s)
		__builtin_memset(&s->packet, 0, sizeof(s->packet));
	return s;
}

/* Judge the connection attempt in s->packet, on one of our listeners. */
static __always_inline struct verdict verdict(struct scratch *s, int charge)
{
	struct verdict v = { .action = ACTION_ALLOW, .stage = STAGE_DEFAULT };
	const struct set_head *head;
	u32 zero = 0, set, rank;
	struct finding *f;
	u64 half, deadline;
	void *cells;
	const struct packet *p = &s->packet;
	struct gate *g = gate.lookup(&zero);

	if (!g)
		return v; /* cannot be: an array has all its elements */
	if (g->flags & GATE_FAILSAFE && is_failsafe(g, p)) {
		v.stage = STAGE_FAILSAFE;
		return v;
	}
	if (g->flags & GATE_BANS) {
		struct address source = p->source;
		struct ban *ban = bans.lookup(&source);

		if (ban && !expired(ban->expires)) {
			if (charge == CHARGE_ADMIT || ban->action == ACTION_REJECT)
				__sync_fetch_and_add(&ban->hits, 1);
			v.stage = STAGE_BAN;
			v.action = ban->action;
			return v;
		}
	}

	__builtin_memset(&s->loaded, 0, sizeof(s->loaded));
	__builtin_memset(&s->runtime, 0, sizeof(s->runtime));
	s->high = bpf_ntohll(p->source.half[0]);
	s->low = bpf_ntohll(p->source.half[1]);
	/* The deadline first: who undoes a change moves `active` before taking the deadline away. */
	deadline = *(volatile u64 *)&g->deadline;
	set = (deadline && bpf_ktime_get_boot_ns() >= deadline ? g->fallback : *(volatile u32 *)&g->active) & 1;
	head = &g->sets[set];
	cells = sets.lookup(&set);
	if (cells)
		search_set(s, cells, head, p);
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
				limit(&v, r->emission, r->tolerance, v.rule, p, charge);
		}
		return v;
	}
	v.action = head->default_action;
	if (v.action == ACTION_ALLOW)
		limit(&v, head->per_source.emission, head->per_source.tolerance, BUCKET_SOURCE, p, charge);
	if (v.action == ACTION_ALLOW)
		limit(&v, head->global.emission, head->global.tolerance, BUCKET_GLOBAL, p, charge);
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
