/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Look-ups: the listener that a packet is for, and the rules that may decide of it, of the loaded set and of the runtime
 * layer.
 */
#ifndef RAMA_EBPF_LOOKUP_H
#define RAMA_EBPF_LOOKUP_H

/* The listener with the most specific binding of the target, if one has any. */
static __always_inline const struct listener *find_binding(const struct packet *p)
{
	struct binding_key key = { .plen = 32 + 128, .ipv4 = is_mapped(&p->target), .addr = p->target };
	struct port_key ports = { .plen = 32 + 16, .port = bpf_htons(p->port) };
	u32 *table = bindings.lookup(&key), *id;

	if (!table)
		return 0;
	ports.table = *table;
	id = bound_ports.lookup(&ports);
	return id ? bound.lookup(id) : 0;
}

/*
 * The listener that a connection attempt is for: of its very address, else of the most specific binding, else of any
 * address of its family. It is copied: the verifier would walk all that follows once for each map that it may be in.
 */
static __always_inline int find_listener(const struct packet *p, struct listener *found, u32 *wildcard)
{
	struct listener_key key = { .addr = p->target, .port = p->port };
	const struct listener *listener = listeners.lookup(&key);

	*wildcard = !listener;
	if (!listener) {
		listener = find_binding(p);
		if (listener) {
			*found = *listener;
			return 1;
		}
		/* The wildcard of the target's family: 0.0.0.0 (mapped) and :: on one port are two listeners. */
		if (is_mapped(&p->target))
			map_ipv4(&key.addr, 0);
		else
			__builtin_memset(&key.addr, 0, sizeof(key.addr));
		listener = listeners.lookup(&key);
	}
	if (!listener)
		return 0;
	*found = *listener;
	return 1;
}

/* The clock costs as much as a look-up: it is read only for what can expire. */
static __always_inline int expired(u64 expires)
{
	return expires && bpf_ktime_get_boot_ns() >= expires;
}

#define barrier() asm volatile("" ::: "memory")

/*
 * The action of the ban that shuts the source out, ACTION_NONE if none does. Its key is left in the scratch.
 * The key that is looked up is on the stack: in the scratch it would double what the verifier has to walk through.
 */
static __always_inline u32 find_ban(struct scratch *s, const struct gate *g)
{
	const struct ban_mask *of = g->bans[!s->packet.ipv4].masks;

#pragma unroll
	for (int i = 0; i < MAX_BAN_LENGTHS; i++) {
		struct ban_key key = {};
		struct ban *ban;

		if (!of[i].length)
			continue;
		key.prefix.half[0] = s->packet.source.half[0] & of[i].mask.half[0];
		key.prefix.half[1] = s->packet.source.half[1] & of[i].mask.half[1];
		key.length = of[i].length;
		ban = bans.lookup(&key);
		if (ban && !expired(ban->expires)) {
			s->ban = key;
			return ban->action;
		}
	}
	return ACTION_NONE;
}

/* Let a rule that applies by its prefix take part; each layer asks its rules from the highest rank to the lowest.
 * Returns 1 if this one decides. */
static __always_inline int consider(struct finding *f, u32 id, u32 length, const struct packet *p)
{
	struct rule *r = rules.lookup(&id);
	u32 rank;

	if (!r)
		return 0;
	rank = (length + 1) << RANK_LENGTH_SHIFT | r->order;
	if (!(r->flags & RULE_CERTAIN)) {
		if (r->action == ACTION_NONE || (r->port && r->port != p->port) || expired(r->expires))
			return 0;
		if (r->flags & RULE_DRY_RUN) {
			if (!f->dry_rank) {
				f->dry_rank = rank;
				f->dry_rule = id;
				f->dry_action = r->action;
			}
			return 0;
		}
	}
	f->rank = rank;
	f->rule = id;
	f->action = r->action;
	return 1;
}

static __always_inline void *page(void *set, u32 index)
{
	return bpf_map_lookup_elem(set, &index);
}

static __always_inline u32 interval_size(u32 layout)
{
	return layout == LAYOUT_SHORT ? 4 : layout == LAYOUT_LONG ? 8 : 32;
}

/* All ones if the interval at p begins at or before the address, of which `high` has the bits that the layout keeps,
 * else zero. Which it is cannot be predicted, so the short layouts take no branch. */
static __always_inline u32 begins_before(const void *p, u32 layout, u64 high, u64 low)
{
	const u64 *full = p;
	s64 difference;

	if (layout == LAYOUT_FULL)
		return full[0] < high || (full[0] == high && full[1] <= low) ? ~0u : 0;
	difference = (layout == LAYOUT_SHORT ? *(const u32 *)p >> 16 : *full >> 16) - high - 1;
	asm volatile("%0 s>>= 63" : "+r"(difference)); /* clang would make it a branch */
	return difference;
}

/*
 * The value of the interval that holds an address, of `count` intervals of which the one at index `at` begins before
 * it. First among the pages that they are on, then on the one.
 */
static __always_inline u32 bisect(void *set, const struct table *t, u32 at, u32 count, u32 layout, u64 high, u64 low)
{
	const u32 size = interval_size(layout), per_page = PAGE_BYTES / size, last = (at + count - 1) / per_page;
	/* `zero` makes values unknown to the verifier, which otherwise walks a loop anew for every range it can tell. */
	u32 first = (at / per_page) ^ t->zero, end = at + count, left = (last - first) ^ t->zero;
	void *p;

	/* A slot of IPv4 has at most 2^16 intervals on 64 pages; no array has 2^16 pages. */
	const int page_steps = layout == LAYOUT_SHORT ? 7 : 16;

#pragma clang loop unroll(disable)
	for (int i = 0; i < page_steps && left; i++) {
		u32 half = (left + 1) / 2;

		p = page(set, t->page + first + half);
		if (!p)
			return 0;
		if (begins_before(p, layout, high, low)) {
			first += half;
			left -= half;
		} else {
			left = half - 1;
		}
		left ^= t->zero;
	}
	p = page(set, t->page + first);
	if (!p)
		return 0;
	at = at > first * per_page ? at - first * per_page : 0;
	end -= first * per_page;
	end = end < per_page ? end : per_page;
	count = (end - at) ^ t->zero;
	at ^= t->zero;
	/* at < per_page, and at + half stays below it; the masks tell the verifier. */
#pragma clang loop unroll(disable)
	for (int i = 0; i < 10 && count > 1; i++) {
		u32 half = count / 2;

		at += half & begins_before(p + ((at + half) & (per_page - 1)) * size, layout, high, low);
		count -= half;
	}
	p += (at & (per_page - 1)) * size;
	if (layout == LAYOUT_SHORT)
		return *(u32 *)p & 0xffff;
	if (layout == LAYOUT_LONG)
		return *(u64 *)p & 0xffff;
	return ((u64 *)p)[2];
}

/* The value of the interval that holds the source, of the set whose number and pages are given. */
static __always_inline u32 find_interval(const struct gate *g, u32 set, void *pages, const struct scratch *s)
{
	u32 family = !s->packet.ipv4, index, first, count;
	const struct table *t = &g->sets[set].tables[family];
	u64 high = family ? s->high : s->low & 0xffffffff, at = high >> (t->shift & 63);
	struct slot *slot;

	if (at < t->base)
		return t->below;
	at -= t->base;
	if (at >= t->slots)
		return t->above;
	index = (set * 2 + family) * MAX_SLOTS + at;
	slot = slots.lookup(&index);
	if (!slot)
		return 0;
	first = slot->first;
	count = slot->count;
	if (!count)
		return first;
	if (!family)
		return bisect(pages, t, first, count, LAYOUT_SHORT, high & 0xffff, 0);
	if (t->layout == LAYOUT_LONG)
		return bisect(pages, t, first, count, LAYOUT_LONG, high & 0xffffffffffff, 0);
	return bisect(pages, t, first, count, LAYOUT_FULL, high, s->low);
}

static __always_inline void search_set(struct scratch *s, const struct gate *g, u32 set, void *pages)
{
	u32 chain = find_interval(g, set, pages, s);

	if (!chain)
		return;
	chain += set * MAX_CHAIN_ITEMS;
#pragma clang loop unroll(disable)
	for (int i = 0; i < MAX_CHAIN; i++) {
		u32 at = chain + i;
		struct chain_item *item = chains.lookup(&at);

		if (!item || consider(&s->loaded, item->rule, item->length, &s->packet) || item->end)
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

	if (!(present->bits[0] | present->bits[1] | present->bits[2]))
		return;
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

#endif
