/// What OpenSSL says went wrong, in words for the operator: the cause, and the remedy.
enum TLSFailure {
    /// X509_V_ERR of OpenSSL's x509_vfy.h.
    private enum Verdict {
        static let notYetValid = 9
        static let expired = 10
        static let revoked = 23
        static let wrongPurpose = 26
        static let rejected = 28
        static let wrongHost = 62
        static let wrongAddress = 64
        static let unknownAuthority: Set<Int> = [2, 7, 18, 19, 20, 21, 27, 79]
        static let noList: Set<Int> = [3, 33]
        static let staleList: Set<Int> = [11, 12]
        static let tooWeak: Set<Int> = [66, 67, 68]
    }

    /// Numbers of OpenSSL's sslerr.h; alerts of the peer are 1000 and the alert's own.
    private enum Reason {
        static let noCertificate: UInt = 199
        static let notTLS: Set<UInt> = [115, 146, 150, 155, 156, 198, 240, 244, 245, 267, 443]
        static let otherVersion: Set<UInt> = [191, 258, 396, 1070]
        static let wrongKey: UInt = 253
        static let nothingInCommon: Set<UInt> = [101, 118, 193, 223, 295]
        static let endOfStream: UInt = 294
        static let alerts: Range<UInt> = 1000..<1256
        static let verificationFailed: UInt = 134
    }

    /// The reason number of an OpenSSL error code of libssl; `nil` for others.
    private static func reason(_ code: UInt) -> UInt? { (code >> 23) & 0xff == 20 ? code & 0x7f_ffff : nil }

    /// Whether the stream ended without the peer saying so.
    static func isTruncation(_ codes: [UInt]) -> Bool { codes.contains { reason($0) == Reason.endOfStream } }

    static func isNotTLS(_ codes: [UInt]) -> Bool { codes.contains { reason($0).map(Reason.notTLS.contains) ?? false } }

    /// The words for a certificate that we did not accept.
    static func ofCertificate(_ code: Int, subject: String, wanted: String?, _ crypto: LibCrypto) -> String {
        let its = subject.isEmpty ? "its certificate" : "its certificate (\(subject))"
        switch code {
        case Verdict.expired: return "\(its) has expired; renew it at the other side"
        case Verdict.notYetValid:
            return "\(its) is not valid yet; compare the clocks of both hosts with the dates in the certificate"
        case Verdict.revoked: return "\(its) has been revoked, says ca-crl.pem; give the other side a new one"
        case Verdict.wrongPurpose:
            return
                "\(its) is not made for this end of a connection; a destination needs one for servers, a source one for clients"
        case Verdict.rejected: return "the peer '\(subject)' is not on the list of those who may come (tls-authz)"
        case Verdict.wrongHost, Verdict.wrongAddress:
            return
                "\(its) is not made for '\(wanted ?? "")'; go to a name or address that it has, or say which it has (tls-hostname)"
        case let code where Verdict.unknownAuthority.contains(code):
            return
                "\(its) is not signed by an authority in our ca-cert.pem; both sides need certificates of one authority"
        case let code where Verdict.noList.contains(code):
            return "ca-crl.pem has no list of the authority that signed \(its); fetch it, or remove ca-crl.pem"
        case let code where Verdict.staleList.contains(code):
            return "ca-crl.pem is out of date and cannot tell whether \(its) was revoked; fetch a new list"
        case let code where Verdict.tooWeak.contains(code):
            return "\(its) has a weaker key or digest than OpenSSL accepts; make a new one"
        default: return "\(its) cannot be trusted (\(words(ofVerdict: code, crypto)))"
        }
    }

    /// The words for our own certificate, found bad when it was loaded.
    static func ofOwnCertificate(_ code: Int, _ crypto: LibCrypto) -> String {
        switch code {
        case Verdict.expired: "the certificate has expired"
        case Verdict.notYetValid: "the certificate is not valid yet"
        case Verdict.revoked: "the certificate has been revoked, says ca-crl.pem"
        case Verdict.wrongPurpose: "the certificate is not made for this endpoint"
        case let code where Verdict.unknownAuthority.contains(code): "the certificate is not signed by ca-cert.pem"
        default: "the certificate is not good: \(words(ofVerdict: code, crypto))"
        }
    }

    private static func words(ofVerdict code: Int, _ crypto: LibCrypto) -> String {
        unsafe crypto.verificationText(code).map { unsafe String(cString: $0) } ?? "error \(code)"
    }

    /// The words for errors of the protocol. - Parameter kind: of our credentials.
    static func ofProtocol(_ codes: [UInt], _ kind: TLSCredentials.Kind, _ crypto: LibCrypto) -> String {
        for code in codes {
            guard let reason = reason(code) else { continue }
            switch reason {
            case Reason.noCertificate:
                return
                    "it showed no certificate, and verify-peer demands one; put client-cert.pem and client-key.pem into its folder"
            case Reason.wrongKey: return "its pre-shared key is not the one in our keys.psk; both sides need the same"
            case Reason.verificationFailed:
                return
                    "it showed a certificate that we cannot verify; both sides need tls-creds-psk, or both tls-creds-x509"
            case Reason.endOfStream: return "it closed the connection without saying so; it may have been cut off"
            case let reason where Reason.notTLS.contains(reason):
                return "what it sent is not TLS; set tls-creds at the other side too"
            case let reason where Reason.otherVersion.contains(reason):
                return "it does not speak TLS 1.3, which is the least that is accepted"
            case let reason where Reason.nothingInCommon.contains(reason): return nothingInCommon(kind)
            case let reason where Reason.alerts.contains(reason): return alert(reason - 1000, kind)
            default: continue
            }
        }
        return "OpenSSL says: \(codes.first.map(crypto.words(for:)) ?? "nothing")"
    }

    private static func nothingInCommon(_ kind: TLSCredentials.Kind) -> String {
        switch kind {
        case .psk:
            "it offers no pre-shared key that is in our keys.psk; both sides need tls-creds-psk and the same keys"
        case .x509: "it offers nothing that we can use; both sides need tls-creds-x509"
        }
    }

    /// RFC 8446, section 6: what the peer says is wrong with us.
    private static func alert(_ number: UInt, _ kind: TLSCredentials.Kind) -> String {
        let log = "its log says more"
        switch (number, kind) {
        case (45, _): return "it refuses us: our certificate has expired; renew it"
        case (44, _): return "it refuses us: our certificate has been revoked; get a new one"
        case (48, _): return "it refuses us: it does not know the authority that signed our certificate; \(log)"
        case (41, .x509), (116, .x509):
            return "it refuses us: it demands a certificate; put client-cert.pem and client-key.pem into our folder"
        case (42, .x509), (43, .x509), (46, .x509), (49, .x509):
            return "it refuses our certificate, which is not valid for it or not on its list (tls-authz); \(log)"
        case (40, .psk), (47, .psk), (49, .psk), (51, .psk), (115, .psk):
            return "it refuses our pre-shared key: the user is unknown or not on its list, or the keys differ; \(log)"
        case (40, .x509): return "it refuses the handshake: no common way, or we are not on its list; \(log)"
        case (70, _): return "it does not speak TLS 1.3, which is the least that is accepted"
        default: return "it refuses the connection (TLS alert \(number)); \(log)"
        }
    }
}
