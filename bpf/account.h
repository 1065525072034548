/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0 */
/*
 * Accounts: what a verdict that took effect leaves behind: counters, hits, events.
 */
#ifndef RAMA_EBPF_ACCOUNT_H
#define RAMA_EBPF_ACCOUNT_H

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

/* Tell those who watch, if there are any. */
static __always_inline void report(const struct verdict *v, const struct packet *p, u32 hook)
{
	u32 zero = 0;
	const struct limit *rate = event_rate.lookup(&zero);
	struct event_meter *meter = event_meter.lookup(&zero);
	struct event e = {};
	u64 next;

	if (!rate || !rate->emission || !meter)
		return;
	e.time = bpf_ktime_get_boot_ns();
	next = next_arrival(meter->arrival, e.time, rate->emission, rate->tolerance);
	if (!next) {
		meter->lost++;
		return;
	}
	meter->arrival = next;
	e.source = p->source;
	e.port = p->port;
	e.hook = hook;
	e.stage = v->stage;
	e.action = v->action;
	e.rule = v->rule;
	e.dry_rule = v->dry_rule;
	e.dry_action = v->dry_action;
	if (events.ringbuf_output(&e, sizeof(e), 0))
		meter->lost++;
}

/* Whether one more denial is kept of this second; what is not is counted. */
static __always_inline int keeps_denial(u64 now)
{
	u32 zero = 0;
	struct event_meter *meter = client_meter.lookup(&zero);
	u64 next, emission = 1000000000ull / DENIALS_PER_SECOND;

	if (!meter)
		return 0;
	next = next_arrival(meter->arrival, now, emission, emission * (DENIAL_BURST - 1));
	if (!next) {
		meter->lost++;
		return 0;
	}
	meter->arrival = next;
	return 1;
}

/* Keep what became of a source. */
static __always_inline void note_client(const struct verdict *v, const struct packet *p, u32 hook)
{
	struct client_key key = { .source = p->source, .port = p->port };
	struct client *known;
	u64 now = bpf_ktime_get_boot_ns();

	if (v->action != ACTION_ALLOW && !keeps_denial(now))
		return;
	known = clients.lookup(&key);
	if (!known) {
		struct client fresh = {};

		clients.update(&key, &fresh);
		known = clients.lookup(&key);
		if (!known)
			return;
	}
	if (v->action == ACTION_ALLOW) {
		__sync_fetch_and_add(&known->let_in, 1);
		known->let_in_last = now;
		return;
	}
	__sync_fetch_and_add(&known->denied, 1);
	known->denied_last = now;
	known->rule = v->rule;
	known->stage = v->stage;
	known->action = v->action;
	known->hook = hook;
}

/* A `reject` that gets no RST, because the rate of those is used up. */
static __always_inline void count_silent(void)
{
	u32 zero = 0;
	u64 *total = silent_rejects.lookup(&zero);

	if (total)
		(*total)++;
}

static __always_inline void count_ban(const struct scratch *s)
{
	struct ban *ban = bans.lookup((struct ban_key *)&s->ban);

	if (ban)
		__sync_fetch_and_add(&ban->hits, 1);
}

/* Count a verdict where it takes effect, so that one SYN is counted once whatever hooks it passed. */
static __always_inline void count(const struct verdict *v, const struct scratch *s, u32 hook)
{
	u32 index = (hook * STAGE_COUNT + v->stage) * ACTION_COUNT + v->action;
	u64 *total = gate_stats.lookup(&index);

	if (total)
		(*total)++;
	if (v->stage == STAGE_RULE || v->stage == STAGE_LIMIT || v->stage == STAGE_DEFAULT)
		count_rule(v->rule, 0); /* rule 0 is the default */
	if (v->stage == STAGE_BAN)
		count_ban(s);
	if (v->dry_rule)
		count_rule(v->dry_rule, 1);
	if (v->stage != STAGE_PARSE) /* whose source is not known */
		note_client(v, &s->packet, hook);
	report(v, &s->packet, hook);
}

#endif
