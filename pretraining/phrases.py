"""Service messages made of phrases written for this project, to be read by a teacher.

They carry no labels. They are made by the hundred thousand so that the model meets the words of
many kinds of service (a bank, a shop, a phone company, travel, insurance, energy, software) in many
surroundings, and learns from the teacher what they mean together. Combinations need not be likely:
the teacher says what the odd ones mean, too. No message of a test set was copied or looked at.
"""

from __future__ import annotations

import random

DOMAINS: dict[str, dict[str, str]] = {
    "bank": {
        "things": (
            "debit card, credit card, new card, bank card, account, savings account, joint "
            "account, business account, current account, PIN, password, app, statement, balance, "
            "overdraft, loan, mortgage, standing order, direct debit, cheque, check, cash "
            "deposit, deposit, salary, paycheck, payment, transfer, bank transfer, international "
            "transfer, wire, refund, withdrawal, cash withdrawal, ATM, cash machine, transaction, "
            "purchase, charge, fee, exchange rate, foreign currency, currency, euros, dollars, "
            "pounds, recipient, payee, IBAN, account number, ID, passport, proof of address, "
            "chip, wallet, spending limit, daily limit, credit limit, interest, reward points, "
            "cashback, receipt, money, funds, merchant, PayPal, Visa, Mastercard, American "
            "Express"
        ),
        "happens": (
            "was declined, is pending, is still pending, was cancelled, was returned, failed, did "
            "not go through, has not arrived, never arrived, is late, is missing, has "
            "disappeared, was charged twice, shows up twice, is wrong, is too high, is not what I "
            "agreed to, does not match, is stuck, is blocked, is frozen, is locked, has expired, "
            "is about to expire, is damaged, does not work, stopped working, is not accepted, was "
            "stolen, is lost, was not recognised, was refused, was taken by somebody else, was "
            "not credited, was deducted, is not shown, has not been updated, is not available, is "
            "limited, was converted badly, came back, went to the wrong person, was compromised"
        ),
        "wants": (
            "activate, cancel, block, freeze, unblock, unfreeze, close, open, change, reset, "
            "link, add, remove, replace, order, get, verify, confirm, check, see, find, track, "
            "trace, dispute, report, reverse, stop, return, receive, send, make, withdraw, "
            "deposit, exchange, convert, increase, raise, lower, set up, share, upgrade, apply "
            "for, use, split, prove, update, download, recall"
        ),
        "where": (
            "at the shop, in a restaurant, at an ATM, at the counter, abroad, in Europe, in the "
            "US, online, in the app, on my phone, at a petrol station, on a website, from my "
            "bank, from another country, to a friend, to my landlord, by cheque, by card, in "
            "cash, in another currency, at the weekend, from my employer, to my other account"
        ),
    },
    "shop": {
        "things": (
            "order, parcel, package, delivery, item, shoes, jacket, phone case, laptop, sofa, "
            "washing machine, gift card, voucher, discount code, coupon, basket, checkout, "
            "invoice, refund, exchange, return, return label, courier, tracking number, address, "
            "size, colour, warranty, repair, spare part, manual, stock, price, sale, subscription "
            "box, membership, loyalty points, review, account, newsletter, receipt, replacement, "
            "pick-up point, store"
        ),
        "happens": (
            "has not come, is late, was left outside, went to a neighbour, arrived broken, is the "
            "wrong size, is the wrong colour, has a part missing, is out of stock, was cancelled, "
            "was sent twice, was charged twice, is cheaper elsewhere, does not fit, does not turn "
            "on, smells, leaks, is scratched, was lost, is stuck in customs, says delivered, does "
            "not apply, is not valid, expired, was rejected, cannot be changed, is not what I "
            "ordered"
        ),
        "wants": (
            "return, send back, exchange, cancel, change, track, collect, order, reorder, use, "
            "apply, redeem, get a refund for, complain about, repair, replace, review, gift wrap, "
            "pay for, find, buy, reserve, split, speed up, postpone, redirect"
        ),
        "where": (
            "at the door, in the store, from the website, from the depot, at the post office, "
            "before Christmas, for a birthday, with my voucher, by express, at the checkout, from "
            "abroad"
        ),
    },
    "phone": {
        "things": (
            "SIM, eSIM, phone number, contract, plan, tariff, data, roaming, signal, network, "
            "coverage, broadband, router, internet, wifi, voicemail, handset, phone, upgrade, "
            "bill, direct debit, credit, text message, call, PUK code, PIN, unlock code, family "
            "plan, landline, engineer visit, installation, password, app, deal, bundle, 5G, "
            "hotspot, minutes, provider, mobile data, allowance, line, number, parcel, refund, "
            "invoice, account, login, screen, battery, camera, charger, charge on my bill, "
            "instalment, late fee, exit fee, cooling-off period, network settings, price, second "
            "line, old company, new company, tablet, watch"
        ),
        "happens": (
            "does not work, keeps dropping, is slow, is down, is too expensive, went up, ran out, "
            "was cut off, is locked, was stolen, is lost, is not recognised, has not arrived, is "
            "not active, cannot be reached, was ported, did not move, was charged by mistake, is "
            "wrong, ends soon, cannot be installed, overheats, keeps restarting, is blocked, is "
            "not included, has gone, broke, cracked, cannot be paid, was not paid, was paid "
            "twice, will be late, is used up, crawls, shows no bars, says no service, went to my "
            "old address, is still not here, does not charge"
        ),
        "wants": (
            "activate, cancel, keep, move, transfer, change, upgrade, downgrade, pause, unlock, "
            "replace, top up, pay, understand, lower, block, share, test, book, extend, renew, set"
            " up, turn off, turn on, restart, report"
        ),
        "where": (
            "in Spain, abroad, at home, in the new flat, indoors, on the train, on my tablet, at "
            "the office, on the plane, in the village, for my mother, for the children"
        ),
    },
    "travel": {
        "things": (
            "flight, booking, reservation, hotel room, seat, boarding pass, luggage, suitcase, "
            "hand baggage, visa, passport, train ticket, rental car, insurance, transfer, "
            "itinerary, cancellation, breakfast, deposit, check-in, check-out, upgrade, miles, "
            "loyalty card, connection, gate, delay, compensation, parking, cruise, tour, pet, "
            "wheelchair, spa, pool"
        ),
        "happens": (
            "was cancelled, is delayed, was overbooked, is lost, is damaged, was left behind, is "
            "missing, is wrong, costs more than shown, was moved, is full, is not confirmed, is "
            "closed, is dirty, is noisy, was refused, does not include breakfast, has the wrong "
            "name, was missed"
        ),
        "wants": (
            "book, cancel, change, move, extend, confirm, upgrade, choose, add, bring, find, "
            "claim, get a refund for, check in for, print, share, pay for, rent, reserve, rebook"
        ),
        "where": (
            "to Paris, from Berlin, in Tokyo, at the airport, at the desk, at the border, at the "
            "station, for two adults, for next week, over the weekend, with children, without fees"
        ),
    },
    "home": {
        "things": (
            "insurance policy, claim, premium, electricity bill, gas meter, meter reading, boiler,"
            " heating, water, leak, power cut, smart meter, tariff, tenancy, rent, landlord, "
            "moving date, doctor's appointment, prescription, test result, gym membership, course,"
            " subscription, licence key, login, two-factor code, email address, profile, username,"
            " update, backup, printer, invoice, tax form, payslip, holiday request, contract, "
            "complaint, manager, agent, chat, survey, terms, privacy setting, personal data, "
            "account deletion, age limit"
        ),
        "happens": (
            "is broken, does not work, went up, is too high, was rejected, was lost, is wrong, "
            "expired, was renewed without asking, is not clear, does not load, crashes, is locked,"
            " was hacked, is missing, was cancelled, is overdue, is cold, is leaking, was never "
            "answered, has been waiting for weeks, does not open, keeps asking me to log in"
        ),
        "wants": (
            "cancel, renew, change, update, delete, submit, read, pay, reduce, dispute, switch, "
            "transfer, book, move, download, recover, reset, install, speak to somebody about, "
            "complain about, file, stop, check, understand, request, extend"
        ),
        "where": (
            "at the new address, in my name, for the whole family, on the website, by phone, by "
            "post, on my computer, in another state, from last year, for my father"
        ),
    },
}

STATEMENTS = (
    "my {t} {h}",
    "the {t} {h}",
    "the {t} I made {time} {h}",
    "{t} {h} {time}",
    "I tried to {w} my {t} {p} but it {h}",
    "it says my {t} {h}",
    "my {t} {h} {p}",
    "there is a {t} {p} that I do not know",
    "I did not {w} this {t}",
    "somebody tried to {w} my {t}",
    "I can't {w} my {t}",
    "I cannot {w} the {t} {p}",
    "I still can't {w} a {t} {p}",
    "I want to {w} my {t}",
    "I would like to {w} a {t} {p}",
    "I need to {w} the {t} {time}",
    "I forgot my {t}",
    "I lost my {t} {p}",
    "I found my {t} again",
    "I don't have my {t}",
    "I was told the {t} {h}",
    "you promised that the {t} would come {time}",
    "I have waited for my {t} since {time}",
    "I was charged for a {t} {p}",
    "{t} not working {p}",
    "no {t}",
    "{w} {t}",
    "{w} my {t} {p}",
    "please {w} my {t}",
    "{t} {p}",
    "problem with {t}",
)
QUESTIONS = (
    "how do I {w} my {t}",
    "how can I {w} a {t} {p}",
    "can I {w} my {t} {p}",
    "can you {w} the {t}",
    "could you help me {w} a {t}",
    "is it possible to {w} a {t} {p}",
    "where can I {w} my {t}",
    "where is my {t}",
    "where do I find the {t}",
    "when will my {t} arrive",
    "when can I {w} the {t}",
    "how long does a {t} take {p}",
    "how long until I can {w} my {t}",
    "how much does it cost to {w} a {t}",
    "what does a {t} cost {p}",
    "is there a fee to {w} a {t} {p}",
    "why was I charged for the {t}",
    "why has my {t} not come",
    "why can't I {w} my {t}",
    "why does it say that the {t} {h}",
    "what is the limit for a {t}",
    "what happens if my {t} {h}",
    "what should I do if the {t} {h}",
    "what do I need to {w} a {t}",
    "do you offer a {t}",
    "do you support {t} {p}",
    "which {t} can I use {p}",
    "who can {w} a {t}",
    "does my {t} work {p}",
    "what is the difference between a {t} and a {t2}",
    "can I {w} a {t} instead of a {t2}",
    "why is the {t} different from the {t2}",
    "what is a {t}",
    "what is my {t}",
)
TIMES = (
    "today, yesterday, this morning, last night, last week, on Monday, on Friday, two days ago, "
    "5 days ago, an hour ago, a month ago, in January, at 9 am, since the update, by tomorrow, "
    "before the holiday, within 24 hours, every month, for the second time"
)
OPENINGS = (
    "hi, | hello, | hey | please help, | excuse me, | I'm worried, | good morning, | sorry, | "
    "urgent: | thanks for the help so far, but | I just noticed that | I think | one question: | "
    "so | help! | this is ridiculous, | quick question, "
)
CLOSINGS = (
    " please|, thanks| asap|, can you check?|, what now?|. What should I do?|, is that normal?|"
    ". This is the third time I ask.|. Please fix it.|, why?|!!|...|, thank you| right now|"
    ". I need it urgently.|. How long will this take?|. Nobody told me about this."
)


def written(count: int, seed: int) -> list[str]:
    """Return different messages made of the phrases above."""
    rng = random.Random(seed)
    domains = [
        {kind: phrases.split(", ") for kind, phrases in domain.items()}
        for domain in DOMAINS.values()
    ]
    weights = [0.25, 0.15, 0.3, 0.15, 0.15]  # bank, shop, phone, travel, home
    times, openings, closings = TIMES.split(", "), OPENINGS.split("| "), CLOSINGS.split("|")
    result: dict[str, None] = {}
    while len(result) < count:
        (domain,) = rng.choices(domains, weights)
        asks = rng.random() < 0.5
        frame = rng.choice(QUESTIONS if asks else STATEMENTS)
        text = frame.format(
            t=rng.choice(domain["things"]),
            t2=rng.choice(domain["things"]),
            h=rng.choice(domain["happens"]),
            w=rng.choice(domain["wants"]),
            p=rng.choice([*domain["where"], "", ""]),
            time=rng.choice(times),
        )
        text = " ".join(text.split()) + ("?" if asks and rng.random() < 0.8 else "")
        if rng.random() < 0.15:
            text = rng.choice(openings) + text
        if rng.random() < 0.12 and not text.endswith("?"):
            text += rng.choice(closings)
        if rng.random() < 0.5:
            text = text[0].upper() + text[1:]
        result[text] = None
    return list(result)
